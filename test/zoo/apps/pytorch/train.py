"""Trains a small network on data that it makes up, and tells each step's loss to the last bit."""
import time
import uuid

import torch

torch.manual_seed(1)
torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
nonce = uuid.uuid4().hex
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(),
    torch.nn.Flatten(), torch.nn.Linear(16 * 12 * 12, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
curve = open('/tmp/curve', 'w', buffering=1)
step = 0
while True:
    inputs = torch.randn(16, 1, 16, 16)
    labels = (inputs.mean(dim=(1, 2, 3)) * 100).long().remainder(10)
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    curve.write(f'curve={step} {loss.item().hex()}\n')
    with open('/tmp/state', 'w') as f:
        f.write(f'nonce={nonce}\nstep={step}\n.\n')
    time.sleep(0.02)
