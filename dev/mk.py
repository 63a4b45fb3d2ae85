# ruff: noqa
"""mk.py NAME FOLDER: a random bf16 checkpoint"""
import os, sys, shutil; sys.path[:0] = [os.getcwd()]
import torch
from model import ModelConfig, Transformer
name, folder = sys.argv[1:]; folder += "/" + name; os.makedirs(folder, exist_ok=True)
with torch.device("meta"): m = Transformer(ModelConfig.from_name(name))
d = "cuda" if torch.cuda.is_available() else "cpu"
state = {k: (torch.randn(v.shape, dtype=torch.bfloat16, device=d) * .02 if v.ndim > 1 else torch.ones(v.shape, dtype=torch.bfloat16)).cpu() for k, v in m.state_dict().items()}
torch.save(state, folder + "/model.pth")
for f in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(".dev/tok/" + f, folder)
