"""Has a kernel execute a cell that does not end, and checks each line of its output."""
import json
import os
import time
import traceback

from jupyter_client import BlockingKernelClient

CELL = """
import os, time
while not os.path.exists('/shared/stop'):
    line += 1
    print('line', line, nonce, os.getpid(), flush=True)
    time.sleep(0.01)
os.remove('/shared/stop')
"""


def publish(*lines):
    with open('/shared/new', 'w') as f:
        f.write(''.join(line + '\n' for line in lines) + '.\n')
    os.rename('/shared/new', '/shared/state')


def established():
    """The connections of the kernel's sockets, without those of its heart: the client
    itself gives one up, and makes another, when a beat is late, as any may be after a freeze."""
    heart = '%04X' % json.load(open('/shared/connection.json'))['hb_port']
    found = set()
    for line in open('/proc/net/tcp').read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == '01' and heart not in (fields[1].split(':')[1], fields[2].split(':')[1]):
            found.add(fields[1] + '-' + fields[2])
    return ','.join(sorted(found))


def work():
    while not os.path.exists('/shared/connection.json'):
        time.sleep(0.05)
    client = BlockingKernelClient(connection_file='/shared/connection.json')
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    client.execute_interactive('import uuid; nonce = uuid.uuid4().hex; line = 0', timeout=60)
    last, nonce, rest = 0, '', ''
    while True:
        cell = client.execute(CELL)
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message['parent_header'].get('msg_id') != cell:
                continue
            kind, content = message['msg_type'], message['content']
            if kind == 'error':
                raise RuntimeError(content['evalue'])
            if kind == 'status' and content['execution_state'] == 'idle':
                break
            if kind != 'stream':
                continue
            *lines, rest = (rest + content['text']).split('\n')
            for line in lines:
                word, number, found, kernel, *more = line.split() + ['', '', '', '']
                nonce = nonce or found
                if [word, number, found] != ['line', str(last + 1), nonce] or any(more):
                    raise RuntimeError(f'{content["name"]} says {line!r} after line {last} of {nonce}')
                last += 1
            publish(f'nonce={nonce}', f'kernel={kernel}', f'line={last}', f'connections={established()}')
        reply = client.get_shell_msg(timeout=60)
        if reply['content']['status'] != 'ok':
            raise RuntimeError(f"the cell ended with {reply['content']}")


try:
    work()
except Exception as e:
    traceback.print_exc()
    publish(f'wrong={e!r}')
    time.sleep(1e9)
