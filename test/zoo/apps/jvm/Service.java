import com.sun.net.httpserver.HttpServer;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.lang.management.ManagementFactory;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.Executors;

/** Threads that step a generator of numbers, of which any step can be computed at once. */
public class Service {
	static final long A = 6364136223846793005L, C = 1442695040888963407L;
	static volatile String wrong;

	static class Stepper extends Thread {
		final long seed;
		long n, x;

		Stepper(long seed) {
			this.seed = x = seed;
			setDaemon(true);
		}

		public void run() {
			for (;;) {
				synchronized (this) {
					for (int i = 0; i < 20000; i++) x = x * A + C;
					n += 20000;
				}
				pause(5);
			}
		}

		/** The steps that were made; complains if their result is another than the formula's. */
		synchronized long verified() {
			long a = 1, c = 0, stepA = A, stepC = C;
			for (long k = n; k > 0; k >>= 1) {
				if ((k & 1) == 1) {
					a *= stepA;
					c = c * stepA + stepC;
				}
				stepC = (stepA + 1) * stepC;
				stepA *= stepA;
			}
			if (a * seed + c != x) wrong = "after " + n + " steps the generator is at " + x + ", not " + (a * seed + c);
			return n;
		}
	}

	static void pause(long ms) {
		try {
			Thread.sleep(ms);
		} catch (InterruptedException e) {
			throw new IllegalStateException(e);
		}
	}

	static volatile long echoes;
	static volatile int port;

	/** Two threads and one connection, over which numbers go back and forth. */
	static void echo() throws Exception {
		ServerSocket server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress());
		Thread far = new Thread(() -> {
			try (Socket s = server.accept()) {
				DataInputStream in = new DataInputStream(s.getInputStream());
				DataOutputStream out = new DataOutputStream(s.getOutputStream());
				for (;;) out.writeLong(in.readLong() + 1);
			} catch (Exception e) {
				wrong = "the far end of the connection: " + e;
			}
		});
		far.setDaemon(true);
		far.start();
		Socket s = new Socket(server.getInetAddress(), server.getLocalPort());
		port = s.getLocalPort();
		Thread near = new Thread(() -> {
			try {
				DataInputStream in = new DataInputStream(s.getInputStream());
				DataOutputStream out = new DataOutputStream(s.getOutputStream());
				for (;;) {
					out.writeLong(echoes);
					long got = in.readLong();
					if (got != echoes + 1) wrong = "echo " + got + " of " + echoes;
					echoes = got;
					pause(1);
				}
			} catch (Exception e) {
				wrong = "the connection: " + e;
			}
		});
		near.setDaemon(true);
		near.start();
	}

	public static void main(String[] args) throws Exception {
		String nonce = UUID.randomUUID().toString();
		List<byte[]> heap = new ArrayList<>();
		for (int i = 0; i < 32; i++) {
			byte[] block = new byte[1 << 20];
			Arrays.fill(block, (byte) (i + nonce.hashCode()));
			heap.add(block);
		}
		List<Stepper> steppers = new ArrayList<>();
		for (int i = 0; i < 8; i++) steppers.add(new Stepper(i));
		steppers.forEach(Thread::start);
		echo();
		HttpServer http = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 8080), 8);
		http.setExecutor(Executors.newFixedThreadPool(4));
		http.createContext("/state", exchange -> {
			long count = 0;
			for (Stepper s : steppers) count += s.verified();
			int hash = 0;
			for (byte[] block : heap) hash = 31 * hash + Arrays.hashCode(block);
			String text = "nonce=" + nonce + "\nstarted=" + ManagementFactory.getRuntimeMXBean().getStartTime() + "\nheap=" + hash
				+ "\nconnection=" + port + "\ncount=" + count + "\nechoes=" + echoes
				+ "\n";
			if (wrong != null) text = "wrong=" + wrong + "\n";
			byte[] body = text.getBytes(StandardCharsets.UTF_8);
			exchange.sendResponseHeaders(200, body.length);
			exchange.getResponseBody().write(body);
			exchange.close();
		});
		http.start();
	}
}
