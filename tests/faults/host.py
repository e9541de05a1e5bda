"""One of several hosts of a run: `python -m tests.faults.host HEARTBEAT ARGUMENTS...`.

It is the command line, with a heartbeat that suits a test, told its place by JAX_PROCESS_ID.
"""

import sys

from jaxtune import cli, flags, pods

if __name__ == "__main__":
    flags.apply()
    pods.start(heartbeat=float(sys.argv[1]), arrival=60, stuck=2 * float(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
