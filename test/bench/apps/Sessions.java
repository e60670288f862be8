import java.nio.file.Files;
import java.nio.file.Path;
import java.security.SecureRandom;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;

/** One of ten replicas: a service that has a catalogue, which is the same in all, and sessions of its own. */
public class Sessions {
	record Article(int number, String name, String text, List<Integer> related) {}

	record Session(UUID id, long began, Map<Integer, Integer> basket) {}

	public static void main(String[] args) throws Exception {
		Map<Integer, Article> catalogue = new HashMap<>();
		for (int i = 0; i < 150_000; i++) {
			List<Integer> related = new ArrayList<>();
			for (int j = 1; j < 4; j++) related.add((i * 31 + j * 977) % 150_000);
			catalogue.put(i, new Article(i, "article " + i, "what is said of article " + i + " in shop " + i % 97, related));
		}
		SecureRandom random = new SecureRandom();
		Map<UUID, Session> sessions = new HashMap<>();
		for (int i = 0; i < 20_000; i++) {
			Session s = new Session(UUID.randomUUID(), System.nanoTime(), new HashMap<>());
			for (int j = 0; j < 4; j++) s.basket.merge(random.nextInt(catalogue.size()), 1, Integer::sum);
			sessions.put(s.id, s);
		}
		Files.createFile(Path.of(args[0]));
		List<UUID> ids = new ArrayList<>(sessions.keySet());
		for (;;) {
			Session s = sessions.get(ids.get(random.nextInt(ids.size())));
			for (int number : s.basket.keySet()) s = catalogue.get(number).related.isEmpty() ? s : sessions.get(ids.get(random.nextInt(ids.size())));
			Thread.sleep(20);
		}
	}
}
