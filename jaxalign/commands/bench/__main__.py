"""One case in a process: `python -m jaxalign.commands.bench '{"what": "sft"}'` prints JSON."""

import json
import sys

from jaxalign.commands.bench import Case, run_case

if __name__ == "__main__":
    print(json.dumps(run_case(Case(**json.loads(sys.argv[1])))))
