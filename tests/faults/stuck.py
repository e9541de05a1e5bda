"""A host that stands still while the other one gets on."""

import json
import sys
import time

from jaxtune import pods
from jaxtune.signals import Stop

if __name__ == "__main__":
    pods.start(**json.loads(sys.argv[1]) | {"stuck": 4})
    with pods.together():
        while True:
            pods.stops(Stop())
            time.sleep(0.1 if pods.is_first() else 600)
