"""One file for each engine that is measured beside ours; each runs in the environment that `make peers` made for it."""
