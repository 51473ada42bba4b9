"""What runs ON a node. Standard library only, Python 3.8 and up; sent over stdin; leaves nothing behind.

Wire format, version 1
----------------------
The controller starts ``PYTHON -I -B -u -c BOOTSTRAP NONCE SIZE`` and writes to its stdin: SIZE bytes (a
zlib-compressed JSON object), then nothing more; the stdin stays open until the agent has exited. When the
agent sees its end, it kills everything it started, and itself. The nonce (16 hex digits) travels on the
command line alone, so that all nodes that are asked the same share one payload.

The object: ``{"v": 1, "modules": {"probes.agent.api": "source", ...}, "request": {...}}``. Modules are
loaded under their own names by an importer in memory. The request::

    {"budget": seconds for everything,
     "checks": [{"check": "host.memory", "module": "probes.checks.host", "function": "memory",
                 "timeout": 10.0, "loads": false, "lane": "host", "params": {...}, "needs": "nvidia" or ""}],
     "watch": {"check": "load.counters", "every": 0.0,
               "collect": [{... as in checks ..., "counters": {"uncorrectable": "ecc_uncorrectable"},
                            "peaks": {"temperature": "temperature_peak"}}]}}

Checks of one lane run one after another, lanes in parallel; the checks that load come last, one at a time.
`watch` may be absent. Its collectors run before the first check that loads the node, after each of them, and
(with `every`) during them each so many seconds. Their records are not sent. One record is, under the watch's
own name: for each metric in `counters`, how much it grew on each device (under the new name); for each in
`peaks`, the highest value seen. A counter that was not read throughout is null. Without a check that loads
(none asked for, none applicable) the record is not_applicable.

The agent writes frames: the byte 0x1e, ``ltp1 NONCE `` and one JSON object in ASCII, then a newline.
Anything else on stdout (login banners, noise) is not a frame and is ignored. Frames::

    {"hello": {"agent": 1, "python": "3.8.10", "hostname": "...", "boot_id": "...", "uid": 0, "time": 1.7e9,
               "kernel": "...", "machine": "x86_64", "cpus": 8, "vendors": ["accelerator", "nvidia"]}}
    {"check": "host.memory", "status": "answered", "seconds": 0.01,
     "measures": [["total", null, 1024], ["temperature", "0", 41.0]], "evidence": ["..."], "detail": ""}
    {"done": true, "seconds": 1.2, "clean": true}

`status` is one of answered, unsupported, error, timeout, not_applicable. A check without a frame is missing.
`clean` is false when a process survived being killed (an uninterruptible wait). A frame has at most 1 MiB.

Exit status: 0 all was answered (perhaps with "the budget is spent"); 1 the payload could not be used, or
the controller was gone; 75 the output could not be written in time; 128 + N ended by signal N.
"""
