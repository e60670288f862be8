import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.lang.management.ManagementFactory;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.UUID;
import java.util.concurrent.atomic.AtomicLong;

/** A shop that answers when its catalogue is there and its code is compiled, as services behind a load balancer do. */
public class Shop {
	record Article(int number, String name, List<Integer> related) {}

	/** SIZE says how often as many. */
	static final int SIZE = Integer.parseInt(System.getenv().getOrDefault("SIZE", "1"));
	static final int ARTICLES = 200_000 * SIZE, WARM_UP = 100_000 * SIZE;
	static final Map<Integer, Article> catalogue = new HashMap<>();
	static final AtomicLong recommended = new AtomicLong();
	static volatile String wrong;

	static void read() {
		Random random = new Random(1);
		for (int i = 0; i < ARTICLES; i++) {
			List<Integer> related = new ArrayList<>();
			for (int j = 0; j < 8; j++) related.add(random.nextInt(ARTICLES));
			catalogue.put(i, new Article(i, "article " + Integer.toString(i, 36) + " of shelf " + i % 97, related));
		}
	}

	/** What is bought with an article: of those that are two steps away, those that most steps lead to. */
	static int recommend(int number) {
		Map<Integer, Integer> votes = new HashMap<>();
		for (int near : catalogue.get(number).related())
			for (int far : catalogue.get(near).related()) votes.merge(far, catalogue.get(far).name().length(), Integer::sum);
		return votes.entrySet().stream().max(Comparator.<Map.Entry<Integer, Integer>>comparingInt(Map.Entry::getValue).thenComparingInt(Map.Entry::getKey)).get().getKey();
	}

	public static void main(String[] args) throws Exception {
		read();
		int[] before = new int[WARM_UP];
		for (int i = 0; i < WARM_UP; i++) before[i] = recommend(i);
		String nonce = UUID.randomUUID().toString();
		Thread customers = new Thread(() -> {
			for (int i = 0;; i = (i + 1) % WARM_UP) {
				int now = recommend(i);
				if (now != before[i]) wrong = "with article " + i + " goes " + now + ", before it was " + before[i];
				recommended.incrementAndGet();
				if (i % 100 == 0) pause();
			}
		});
		customers.setDaemon(true);
		customers.start();
		HttpServer http = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 8080), 8);
		http.createContext("/recommend", exchange -> answer(exchange, recommend(7) + "\n"));
		http.createContext("/state", exchange -> {
			String text = "nonce=" + nonce + "\nstarted=" + ManagementFactory.getRuntimeMXBean().getStartTime() + "\ncatalogue=" + catalogue.hashCode()
				+ "\nrecommended=" + recommended + "\n";
			if (wrong != null) text = "wrong=" + wrong + "\n";
			answer(exchange, text);
		});
		http.start();
	}

	static void answer(HttpExchange exchange, String text) throws IOException {
		byte[] body = text.getBytes(StandardCharsets.UTF_8);
		exchange.sendResponseHeaders(200, body.length);
		exchange.getResponseBody().write(body);
		exchange.close();
	}

	static void pause() {
		try {
			Thread.sleep(20);
		} catch (InterruptedException e) {
			throw new IllegalStateException(e);
		}
	}
}
