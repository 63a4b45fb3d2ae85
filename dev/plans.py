"""Steps of one row by plan of attention: python dev/plans.py MODEL:MODE[,MODE] ... (kernels compile in turn)."""

import os
import sys

sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace

import bench
import ops.attention_triton as at
import torch
from model import ModelConfig
from ops.attention_triton import Plan

PLANS = {
    "w4": Plan(264, 4, 16, 2, None),
    "w8": Plan(132, 8, 16, 2, None, split_keys=256),
    "w8, 128": Plan(132, 8, 16, 2, None),
}
device, plan = torch.device("cuda"), at.plan
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, modes = job.split(":")
        for mode in modes.split(","):
            config = ModelConfig.from_name(name)
            model = bench.random_model(config, mode, device, torch.bfloat16)
            for length in (400, 1200, 2 * 8192, 2 * 32768):  # step_time has half of it in the cache
                if length > 2 * config.block_size:
                    continue
                found = []
                for turn in range(2):
                    for of, how in PLANS.items():
                        at.plan = lambda kind, DP, S, groups: (
                            how if S == 1 and groups <= 132 else plan(kind, DP, S, groups)
                        )
                        found.append(f"{of}: {bench.step_time(model, 1, length) * 1e6:.0f}")
                print(name, mode, length // 2, "us:", "; ".join(found), flush=True)
            del model
            bench.release(device)
