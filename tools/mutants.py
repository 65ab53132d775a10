#!/usr/bin/env python3
"""Tries the vectors: each mutant of plain_decoder.py must fail at least one of them.

    mutants.py [VECTORS] [--mutants FILE] [--only ID] [--most N]      --most: so many that catch it (3), 0 for all
Exit codes: 0 every mutant is caught, 1 one survives, 2 a mutant does not apply or the unchanged decoder fails.
"""
import argparse, contextlib, io, json, multiprocessing, os, signal, sys, tempfile, types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import conform
def load(folder):
    """The decode vectors with their bytes; the manifest holds them, or names a file for each, or for its events."""
    loaded = []
    for vector in json.loads((folder / "manifest.json").read_text())["vectors"]:
        vector = json.loads((folder / vector).read_text()) if isinstance(vector, str) else vector
        if isinstance(vector["events"], str):
            vector["events"] = [json.loads(line) for line in (folder / vector["events"]).read_text().splitlines()]
        if vector["kind"] == "decode":
            loaded.append((vector, conform.load_vector(folder, vector)))
    return sorted(loaded, key=lambda pair: len(pair[1]))

def play(program, data, told):
    """Run a decoder within this process: exit code, output, complaint."""
    output, complaint, code = io.StringIO(), "", 0
    os.environ.clear()
    os.environ.update(told)
    sys.stdin = types.SimpleNamespace(buffer=io.BytesIO(data))
    signal.alarm(30)
    try:
        with contextlib.redirect_stdout(output):
            exec(program, {"__name__": "__main__"})
    except SystemExit as ending:
        code = ending.code
    except BaseException as error:  # also the alarm, and what a mutant makes of the bytes
        code, complaint = 1, repr(error)
    signal.alarm(0)
    return code, output.getvalue().encode(), complaint

def catch(task):
    """The vectors that a program fails, at most so many."""
    path, folder, most = task
    program, caught = compile(Path(path).read_text(), path, "exec"), []
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("30 s")))
    for vector, data in load(folder):
        verdict = conform.Verdict(vector["id"], vector["sections"])
        conform.compare(verdict, vector, *play(program, data, conform.environment(vector)))
        caught += [] if verdict.passed else [vector["id"]]
        if len(caught) == most:
            break
    return caught

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, nargs="?", default=HERE.parent / "specs" / "vectors")
    parser.add_argument("--mutants", type=Path, default=HERE / "mutants.json")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--most", type=int, default=3)
    options = parser.parse_args()
    source = (HERE / "plain_decoder.py").read_text()
    mutants = [one for one in json.loads(options.mutants.read_text()) if not options.only or one["id"] in options.only]
    wrong = [one["id"] for one in mutants if source.count(one["old"]) != 1 or "\n" in one["old"] + one["new"]]
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Pool(2) as pool:
        tasks = [(str(HERE / "plain_decoder.py"), options.vectors, 3)]
        for one in mutants:
            (Path(temporary) / f"{one['id']}.py").write_text(source.replace(one["old"], one["new"]))
            tasks.append((str(Path(temporary) / f"{one['id']}.py"), options.vectors, options.most or -1))
        unchanged, *results = pool.map(catch, tasks, chunksize=1)
    if wrong or unchanged:
        print(f"do not apply: {wrong}; the unchanged decoder fails: {unchanged}")
        return 2
    for one, caught in zip(mutants, results):
        print(f"{one['id']:<28}{', '.join(caught) or 'SURVIVES: ' + one['mistake']}")
    print(f"{sum(map(bool, results))} of {len(mutants)} mutants are caught")
    return 0 if all(results) else 1

if __name__ == "__main__":
    sys.exit(main())
