"""Process that answers as a worker does, at once: its order's implementation says how it ends."""

import json
import os
import signal
import sys
import time

print(json.dumps({"ready": os.getpid()}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    task = order["task"]
    who = task["implementation"]
    if who == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if who == "exits":
        os._exit(3)
    if who == "hangs":
        time.sleep(60)
    if task["kind"] == "rates":
        answer = {"rates": dict(name="a device", cuda_name="", copy=1e9, matrix_16=1e9,
                                matrix_32=1e9, arithmetic=1e9)}  # fmt: skip
        print(json.dumps(answer), flush=True)
        continue
    problem = {
        "short of memory": "out of memory", "missing": "ModuleNotFoundError: No module named 'x'",
    }.get(who)  # fmt: skip
    row = dict(shape=task["shape"], dims={"N": 8}, implementation=who, pass_name=task["part"])
    row["milliseconds"] = None
    if problem is None:
        slow = 0.5 if who == "slow" else 0.0
        time.sleep(slow)
        row |= dict(milliseconds=2.0 + task["turn"], lower_quartile=1.0, upper_quartile=9.0,
                    percent_of_bound=60.0, error=1e-3, bytes=8, flops=8)  # fmt: skip
    print(json.dumps({"row": row | {"problem": problem}, "pid": os.getpid()}), flush=True)
