"""One of ten replicas: a search service that has read the source of the standard library,
and has sessions of its own."""
import asyncio, collections, csv, decimal, email, http.server, json, logging, os, random, re, sqlite3, ssl, sys, sysconfig, threading, time, unittest, urllib.request, xml.dom.minidom  # noqa: E401

root = sysconfig.get_paths()['stdlib']
words = re.compile(r'[A-Za-z_]{3,}')
index = collections.defaultdict(list)
texts = []
size = 0
for directory, below, names in os.walk(root):
    below[:] = sorted(d for d in below if d not in ('test', 'tests', 'site-packages', 'dist-packages', '__pycache__'))
    for name in sorted(names):
        if not name.endswith('.py') or size > 5_000_000:
            continue
        with open(os.path.join(directory, name), encoding='utf-8', errors='replace') as f:
            text = f.read()
        size += len(text)
        texts.append(text)
        for word in words.finditer(text):
            index[word.group()].append((len(texts) - 1, word.start()))

database = sqlite3.connect(':memory:')
database.execute('create table words (word text, count integer)')
database.executemany('insert into words values (?, ?)', ((word, len(places)) for word, places in index.items()))

mine = random.SystemRandom()
known = sorted(index)
sessions = []
for number in range(2000):
    queries = mine.sample(known, 8)
    found = [texts[n][at:at + 60] for word in queries for n, at in index[word][:4]]
    sessions.append({'id': mine.getrandbits(128), 'user': f'user-{mine.getrandbits(32)}', 'queries': queries, 'found': found})
open(sys.argv[1], 'w').close()
while True:
    session = mine.choice(sessions)
    session['queries'] = mine.sample(known, 8)
    time.sleep(0.05)
