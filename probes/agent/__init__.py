"""What runs ON a node. Standard library only, Python 3.8 and up; sent over stdin; leaves nothing behind.

Wire format, version 1
----------------------
The controller starts ``PYTHON -u -c BOOTSTRAP NONCE SIZE`` and writes to its stdin: SIZE bytes (a zlib-compressed
JSON object), then nothing more; the stdin stays open until the agent has exited. When the agent sees its
end, it kills everything it started, and itself.

The object: ``{"v": 1, "modules": {"probes.agent.api": "source", ...}, "request": {...}}``. Modules are
loaded under their own names by an importer in memory. The request::

    {"nonce": "16 hex digits", "time": controller's Unix time, "budget": seconds for everything,
     "checks": [{"check": "host.memory", "module": "probes.checks.host", "function": "memory",
                 "timeout": 10.0, "loads": false, "lane": "host", "params": {...}, "needs": "nvidia" or ""}]}

The agent writes frames: the byte 0x1e, ``ltp1 NONCE `` and one JSON object, then a newline. Anything else on stdout
(login banners, noise) is not a frame and is ignored. Frames::

    {"hello": {"agent": 1, "python": "3.8.10", "hostname": "...", "boot_id": "...", "uid": 0, "time": 1.7e9,
               "kernel": "...", "machine": "x86_64", "cpus": 8, "vendors": ["nvidia"]}}
    {"check": "host.memory", "status": "answered", "seconds": 0.01,
     "measures": [["total", null, 1024], ["temperature", "0", 41.0]], "evidence": ["..."], "detail": ""}
    {"done": true, "seconds": 1.2}

`status` is one of answered, unsupported, error, timeout, not_applicable. A check without a frame is missing.
"""
