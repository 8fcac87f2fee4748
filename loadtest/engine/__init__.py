"""How fast an engine makes tokens on this machine, beside what the machine could give and beside other engines.

Every engine computes the same model (`bench_model`: 283 M parameters, random weights, seed fixed) from the same
weights, with the same prompt lengths, threads and batch sizes, greedily and past any end of text:

1. `contestants`   who takes part, in which environment
2. `session`       what an engine's process is asked, and how its steps become rates; `peers/` drives each engine
3. `ours`          runs `halftone bench --json`, as anybody would
4. `limits`        what the machine reads and multiplies per second at most
5. `measure`       takes turns, A B A B, and keeps every run; `bars` judges, `render` shows

Nothing is imported here: `peers` runs in other environments, which have none of our packages.
"""
