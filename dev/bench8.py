# ruff: noqa
import os, sys
tree = os.environ.get("TREE", os.getcwd())
sys.path[:0] = [tree, tree + "/scripts"]
import engine
engine.CAPTURED = (8,)
if os.environ.get("SHORT"):
    from dataclasses import replace
    from model import ModelConfig
    real = ModelConfig.from_name
    ModelConfig.from_name = staticmethod(lambda name: replace(real(name), n_layer=2))
import bench
sys.argv[0] = "scripts/bench.py"
bench.main()
