# ruff: noqa
import os
def pytest_collection_modifyitems(items):
    i, n = map(int, os.environ["SHARD"].split("/"))
    own = ("test_kernels.py", "test_linear.py", "test_experts.py", "test_kv_cache.py")
    use = [x for x in items if x.get_closest_marker("cuda") or x.path.name in own]
    last = [x for x in use if "test_configurations" in x.name]
    items[:] = [x for x in use if x not in last][i::n] + last[i::n]
