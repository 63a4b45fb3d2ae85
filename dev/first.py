# ruff: noqa
"""first.py COMMAND...: seconds from the start of a process to its first byte of text"""
import os, subprocess, sys, time
t = time.perf_counter(); p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
p.stdout.read(1); first = time.perf_counter() - t; rest = p.stdout.read(); err = p.stderr.read(); p.wait()
print("FIRST", round(first, 2), "whole", round(time.perf_counter() - t, 2), "rc", p.returncode, err.decode()[-300:] if p.returncode else "", flush=True)
