"""The program given to the node's Python on its command line. Controller side.

It has to pass any login shell inside single quotes: one line, no single quote, backslash, ``!``, ``$`` or
backtick. All it does is read the payload and hand over to `probes.agent.loader`; what goes wrong until then
ends in one line on stderr and exit status 1.
"""

BOOTSTRAP = (
    "import sys;"
    "sys.version_info<(3,8)and sys.exit("
    '"ltp agent: needs Python 3.8 or newer, this is "+sys.version.split()[0]);'
    "sys.excepthook=lambda t,e,b:sys.stderr.write("
    '"ltp agent: the payload cannot be used: "+t.__name__+": "+str(e)+chr(10));'
    "import json,zlib;"
    "n=int(sys.argv[2]);d=sys.stdin.buffer.read(n);"
    'len(d)<n and sys.exit("ltp agent: the payload was cut short: "+str(len(d))+" of "+str(n)+" bytes came");'
    "p=json.loads(zlib.decompress(d));"
    'g={"__name__":"loader"};exec(p["modules"]["probes.agent.loader"],g);g["start"](sys.argv[1],p)'
)

OPTIONS = ("-I", "-B", "-u")
"""Isolated (neither the login's folder nor PYTHON* variables can replace a standard module), no bytecode
files, no buffering. `probes.agent.worker` adds the user's own packages behind everything else."""


def command_line(nonce: str, size: int, python: str = "python3") -> "tuple[str, ...]":
    """Argument vector that runs the agent for a payload of `size` bytes."""
    return (python, *OPTIONS, "-c", BOOTSTRAP, nonce, str(size))
