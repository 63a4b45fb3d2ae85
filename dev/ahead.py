"""Steps of one row by how many steps of weights are asked for ahead, and by attention's plan:

python dev/ahead.py LAYERS MODEL:MODE ...     LAYERS: 0 for all; 2 compiles (in so many processes as there are jobs)
"""

import os
import sys

sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace

import bench
import ops
import ops.attention_triton as at
import torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton as lt
from ops.attention_triton import Plan

layers, device, plan = int(sys.argv[1]), torch.device("cuda"), at.plan
few = {
    "w4": Plan(264, 4, 16, 2, None),
    "w8": Plan(132, 8, 16, 2, None, split_keys=256),
    "w8t1": Plan(132, 8, 16, 1, None, split_keys=256),
}
with torch.inference_mode():
    bandwidth = 1 if layers else ops.read_bandwidth(device)
    for job in sys.argv[2:]:
        name, mode = job.split(":")
        config = ModelConfig.from_name(name)
        model = bench.random_model(replace(config, n_layer=layers or config.n_layer), mode, device, torch.bfloat16)
        limit = weight_bytes(model, 1) / bandwidth
        for _ in range(1 if layers else 2):
            found = []
            ways = ((0, 0, "w4"), (1, 0, "w4"), (2, 0, "w4"), (1, 1, "w4"), (2, 1, "w4"), (4, 1, "w4"))
            for ahead, stream, of in (*ways, (0, 0, "w8"), (1, 1, "w8"), (2, 1, "w8"), (0, 0, "w8t1")):
                lt.AHEAD, lt.STREAM, how = ahead, bool(stream), few[of]
                at.plan = lambda kind, DP, S, groups, how=how: (
                    how if S == 1 and groups <= 132 else plan(kind, DP, S, groups)
                )
                seconds = bench.step_time(model, 1, 400)
                found.append(f"{ahead}{stream} {of} {seconds * 1e6:.0f} us {limit / seconds:.3f}")
            if not layers:
                print(name, mode, "; ".join(found), flush=True)
        del model
        bench.release(device)
