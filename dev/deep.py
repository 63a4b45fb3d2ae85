# ruff: noqa
"""Steps of one row with two steps of weights on their way, and with constants asked for before the wait.

python dev/deep.py compile MODEL:MODE I N     compile every N-th case from I on, in a process of its own
python dev/deep.py run MODEL:MODE             the best of each layer in turn
"""

import os
import sys

sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace

import bench
import ops
import torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton as lt
from ops.tuning import Configuration

INT8 = [
    (16, 2, 4, 96, 0),
    (16, 2, 4, 112, 0),
    (32, 1, 4, 128, 0),
    (32, 2, 4, 160, 0),
    (16, 1, 4, 80, 0),
    (16, 2, 8, 96, 2),
]
INT8_DOWN = [(16, 2, 8, 96, 2), (16, 2, 8, 120, 2), (32, 1, 16, 128, 1), (16, 2, 4, 96, 0), (32, 2, 8, 240, 1)]
INT4 = [(32, 1, 4, 128, 0), (16, 1, 4, 96, 0), (16, 1, 8, 80, 0), (16, 2, 4, 128, 0), (64, 1, 4, 168, 3)]
INT4_DOWN = [(32, 1, 16, 128, 1), (32, 1, 8, 200, 1), (16, 1, 16, 64, 2), (16, 1, 8, 120, 2), (16, 2, 8, 128, 2)]
BF16 = [(16, 4, 8, 128, 2), (16, 4, 16, 120, 1), (16, 2, 8, 96, 2), (16, 2, 4, 96, 0), (16, 8, 8, 128, 2)]
CASES = {"int8": (INT8, INT8_DOWN), "int4": (INT4, INT4_DOWN), "bf16": (BF16, BF16)}

what, job, *rest = sys.argv[1:]
name, mode = job.split(":", 1)
device, config = torch.device("cuda"), ModelConfig.from_name(name)
if what == "compile":
    config = replace(config, n_layer=2)
with torch.inference_mode():
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]
    up, down = CASES[mode]
    layers = {"wo": layer.attention.wo, "w2": layer.feed_forward.w2, "wqkv": layer.attention.wqkv}
    layers["w13"] = layer.feed_forward.w13
    cases = {}  # (layer, configuration, deep)
    for of, linear in layers.items():
        shape = linear.out_features, linear.in_features
        own = lt.tuning.configuration(lt.kind_of(linear.weight), *shape, 1, device)
        tried = [own, *(Configuration(*c) for c in (down if of in ("wo", "w2") else up))]
        cases[of] = shape, [(how, deep) for how in dict.fromkeys(tried) for deep in (False, True)]
    flat = [(of, *case) for of, (_, found) in cases.items() for case in found]

    def step(chosen: dict) -> float:
        lt.TRY = {cases[of][0]: how for of, (how, _) in chosen.items()}
        lt.DEEPER = {cases[of][0] for of, (_, deep) in chosen.items() if deep}
        return bench.step_time(model, 1, 400) * 1e6

    if what == "compile":
        first, count = map(int, rest)
        for of, how, deep in flat[first::count]:
            step({of: (how, deep)})
        if first == 0:
            lt.CONSTANTS = True
            step({})
        sys.exit()
    limit = weight_bytes(model, 1) / ops.read_bandwidth(device) * 1e6
    best = start = step({})
    lt.CONSTANTS = True
    constants = step({})
    print(job, f"{start:.0f} us, {limit / start:.3f}; with constants {constants:.0f}", flush=True)
    lt.CONSTANTS = constants < start
    best, chosen = min(start, constants), {}
    for of, (_, found) in cases.items():
        times = {case: step(chosen | {of: case}) for case in found}
        for case, us in sorted(times.items(), key=lambda item: item[1]):
            print(job, of, tuple(vars(case[0]).values()), "deep" if case[1] else "", f"{us:.0f}", flush=True)
        case = min(times, key=times.get)
        if times[case] < best * 0.9985 and (us := step(chosen | {of: case})) < best * 0.9985:
            best, chosen = us, chosen | {of: case}
    found = {of: (*vars(how).values(), deep) for of, (how, deep) in chosen.items()}
    print(job, f"{start:.0f} -> {best:.0f} us, {limit / start:.3f} -> {limit / best:.3f}", found, flush=True)
