"""Measures any OpenAI-compatible server from outside, over HTTP.

Nothing here imports the server: a load test that shared code with what it measures could share its mistakes.
The commands are in `loadtest.cli`; `python -m loadtest --help` lists them and `loadtest/README.md` defines
every number.

How one run flows, a file a step:

1. `settings`    what to send, where, how fast (`scenario` reads it from YAML)
2. `arrivals`    when each request leaves;  `workload`  what it says
3. `generator`   sends them (`client` speaks HTTP and takes the timestamps), in processes that `fleet` starts
4. `record`      reads what came back, after the timestamps were taken (`sse` splits the stream)
5. `summary`     turns records into percentiles and intervals (`statistics`), `sweep` looks for the knee
6. `results`     writes the JSON; `compare` and `report` read it again
"""
