"""One case in a process: `python -m jaxalign.commands.bench '{"what": "sft"}'` prints JSON."""

import json
import sys

from jaxalign.commands.bench import Case, run_case
from jaxalign.commands.startup.freed_memory import return_freed_memory

if __name__ == "__main__":
    return_freed_memory()  # as the command does
    print(json.dumps(run_case(Case(**json.loads(sys.argv[1])))))
