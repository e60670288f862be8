"""A search service. What it needs to answer it makes at its start, which takes a while. SIZE says of how many copies of the library."""
import collections
import hashlib
import http.server
import os
import random
import re
import sysconfig
import threading
import time
import uuid

words = re.compile(r'[A-Za-z_]{3,}')
texts, index = [], collections.defaultdict(list)


def read(root):
    for directory, below, names in os.walk(root):
        below[:] = sorted(d for d in below if d not in ('__pycache__', 'site-packages', 'dist-packages'))
        for name in sorted(names):
            if name.endswith('.py'):
                with open(os.path.join(directory, name), encoding='utf-8', errors='replace') as f:
                    texts.append(f.read())


def relate(common=300, kept=5):
    """For each text, those that share the most words with it that are not in very many texts."""
    shared = [collections.Counter() for _ in texts]
    for places in index.values():
        holders = sorted({number for number, _ in places})
        if len(holders) <= common:
            for number in holders:
                shared[number].update(holders)
    return [[other for other, _ in counts.most_common(kept + 1) if other != number] for number, counts in enumerate(shared)]


def fingerprint(parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode('utf-8', errors='replace'))
    return digest.hexdigest()[:16]


def index_words():
    for number, text in enumerate(texts):
        for word in words.finditer(text):
            index[word.group()].append((number, word.start()))


for _ in range(int(os.environ.get('SIZE', 1))):
    read(sysconfig.get_paths()['stdlib'])
index_words()
related = relate()
nonce, started = uuid.uuid4(), time.time()
known = sorted(index)
lock, queries, wrong = threading.Lock(), 0, ''


def ask():
    """Looks words up, and compares with where the texts have them."""
    global queries, wrong
    while True:
        word = random.choice(known)
        number, at = random.choice(index[word])
        first = next(words.finditer(texts[number], at)).group()
        with lock:
            queries += 1
            if first != word:
                wrong = f'the index has {word} at {at} of text {number}, where there is {first}'
        time.sleep(0.002)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/find':
            word = random.choice(known)
            self.answer(f'{word} {len(index[word])}\n'.encode())
            return
        with lock:
            lines = [f'wrong={wrong}'] if wrong else [f'queries={queries}']
        lines += [f'nonce={nonce}', f'started={started}', f'texts={fingerprint(texts)}', f'related={fingerprint(map(str, related))}', f'index={len(known)}.{sum(map(len, index.values()))}']
        self.answer(('\n'.join(lines) + '\n').encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


threading.Thread(target=ask, daemon=True).start()
http.server.ThreadingHTTPServer(('127.0.0.1', 8080), Handler).serve_forever()
