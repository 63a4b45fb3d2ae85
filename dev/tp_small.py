# ruff: noqa
import os, sys, time, tempfile
sys.path[:0] = [os.getcwd(), os.getcwd() + "/tests"]
from pathlib import Path
import torch
import test_tp
from test_tp import *
def _rank(directory):
    torch.set_num_threads(1)
    begin = time.time()
    with session() as tp:
        say = lambda *a: tp.rank == 0 and print(f"[tp {time.time()-begin:.0f}]", torch.cuda.device_count(), *a, flush=True)
        say("started", place(tp))
        test_tp._same_sums(tp); say("sums equal, with and without a residual, 1000 to 2^23 values")
        plain = tiny_config(tp.world)
        mixture = tiny_config(tp.world, n_expert=5, n_expert_used=2, expert_size=96, shared_size=160)
        gpt_oss = {"n_expert": 3, "n_expert_used": 2, "expert_size": 64, "norm_topk": True, "router_bias": True}
        gpt_oss |= {"glu_limit": 1.0, "glu_alpha": 1.7, "mlp_bias": True, "sinks": True}
        gpt_oss = tiny_config(tp.world, **gpt_oss)
        cases = [(plain, "plain", torch.float32), (plain, "plain", torch.bfloat16), (plain, "int8", torch.bfloat16), (plain, "int4:32", torch.bfloat16), (mixture, "plain", torch.float32), (mixture, "int8", torch.float32), (gpt_oss, "plain", torch.float32)]
        for i, (config, kind, dtype) in enumerate(cases):
            path = directory / f"{i}.pth"
            if tp.rank == 0:
                write_model(path, config, kind)
            tp.share(0)
            test_tp._compare(path, config, dtype, None, tp); say("logits equal", i, kind, dtype)
        test_tp._same_tokens(directory / "0.pth", plain, tp); say("greedy, sampled, speculative text and a queue equal")
        test_tp._compare(directory / "0.pth", plain, torch.float32, "int4:64", tp); say("8-bit cache, quantised on the way")
        print("all equal", flush=True)
test_tp._rank = _rank
test_tp._launch(Path(tempfile.mkdtemp()), 2)
