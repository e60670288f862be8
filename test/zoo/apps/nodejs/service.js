const crypto = require('crypto');
const http = require('http');

const nonce = crypto.randomUUID();
const memory = new Map();
for (let i = 0; i < 20000; i++) memory.set('key ' + i, nonce + i);
let wrong = '', ticks = 0, hashes = 0, requests = 0, connection = '';

setInterval(() => ticks++, 5);

// The thread pool: each hash is of the one before.
let last = nonce;
function hash() {
	crypto.pbkdf2(last, 'salt', 2000, 32, 'sha256', (err, key) => {
		if (err) wrong = 'hash: ' + err;
		const want = hashes % 50 === 0 ? crypto.pbkdf2Sync(last, 'salt', 2000, 32, 'sha256') : key;
		if (!want.equals(key)) wrong = `hash ${hashes} is wrong`;
		last = key.toString('hex');
		hashes++;
		setImmediate(hash);
	});
}
hash();

const server = http.createServer((request, response) => {
	if (request.url === '/count') {
		request.socket.counted = (request.socket.counted || 0) + 1;
		response.end(`${request.socket.remotePort} ${request.socket.counted}`);
		return;
	}
	const digest = crypto.createHash('sha256');
	for (const [key, value] of memory) digest.update(key + value);
	response.end(wrong ? `wrong=${wrong}\n` : `nonce=${nonce}\nconnection=${connection}\nmemory=${digest.digest('hex')}\nticks=${ticks}\nhashes=${hashes}\nrequests=${requests}\n`);
});
server.keepAliveTimeout = server.requestTimeout = server.timeout = 0;
server.listen(8080, '127.0.0.1', () => {
	const agent = new http.Agent({keepAlive: true, maxSockets: 1});
	(function ask() {
		const request = http.get({port: 8080, host: '127.0.0.1', path: '/count', agent}, response => {
			let text = '';
			response.on('data', data => text += data);
			response.on('end', () => {
				const [port, counted] = text.split(' ');
				requests++;
				connection = connection || port;
				if (port !== connection || Number(counted) !== requests) wrong = `request ${requests} was number ${counted} of connection ${port}, not of ${connection}`;
				setTimeout(ask, 2);
			});
		});
		request.on('error', err => wrong = 'the connection: ' + err);
	})();
});
