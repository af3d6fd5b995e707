"""Two hosts on one machine, one of which is cut off: `python tests/two_hosts.py` (as root, with iproute2 and ray).

Two network namespaces are the hosts: a Ray head in one, a worker in the other, two made-up GPUs each, and one outputs folder that the worker has mounted
elsewhere. A grid runs on both. In the middle the worker's cable is pulled (or, with --lose power, all its processes are killed). The folder stays, as if it
came by another cable. Checked: Ray notices, the rest is done on the head, and the results are bit-equal to those of a grid on this machine alone. Said: how
long it took to notice, what was begun again, and when the lost host had stopped its work."""
import argparse
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
from kill_grid import ROOT, results, with_suppressed

RAY = Path(sys.executable).parent / "ray"
GRID = """recipes = ["baseline"]
folds = [0, 1]
seeds = [1, 2, 3, 4, 5]
[data]
n_folds = 2
[recipe]
epochs = {epochs}
precision = "fp32"
max_length = 32
text_fields = ["title"]
[[backbone]]
name = "small"
"""
PORTS = ["--dashboard-agent-grpc-port=6401", "--dashboard-agent-listen-port=6402", "--runtime-env-agent-port=6403", "--metrics-export-port=6404"]
WATCH = """
import sys, time
import ray
ray.init(sys.argv[1], configure_logging=False, log_to_driver=False)
while True:
    print(time.time(), sum(node["Alive"] for node in ray.nodes()), flush=True)
    time.sleep(0.5)
"""
BEGUN = "rows to train on"  # what the notebook prints when it begins


def why_not() -> str:
    "Why two hosts cannot be made here; '' if they can."
    if not RAY.is_file():
        return "ray is not installed"
    if not shutil.which("ip") or os.geteuid():
        return "network namespaces need iproute2 and root"
    name = f"esci{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    "Two hosts with a cable between them, in a `with` block: `head` and `worker`."

    def __init__(self, work: Path):
        name = secrets.token_hex(3)
        self.work, self.temporary = work, Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets need a short path
        self.names = {"head": f"h{name}", "worker": f"w{name}"}
        self.addresses = {"head": "10.213.0.1", "worker": "10.213.0.2"}
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        ip("link", "add", self.names["head"], "type", "veth", "peer", "name", self.names["worker"])
        for host, name in self.names.items():
            ip("netns", "add", name)
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_) -> None:
        for host in self.names:
            for one in self.on(host):
                with_suppressed(one.kill)
        for process in self.processes:
            process.wait()
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name])
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start(self, host: str, log: str, words: list[str], **environment: str) -> subprocess.Popen:
        "Start a process on a host; what it prints goes to the file `log`."
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "180"} | environment
        with open(self.work / log, "ab") as stream:
            process = subprocess.Popen(["ip", "netns", "exec", self.names[host], *words], env=environment, stdin=subprocess.DEVNULL, stdout=stream,
                                       stderr=stream, cwd=self.work)
        self.processes.append(process)
        return process

    def start_patiently(self, host: str, words: list[str], **environment: str) -> None:
        "Start Ray on a host, up to five times: it gives up after 30 s, which a busy machine may need (and after 15 s without `PORTS`)."
        for attempt in range(5):
            process, log = self.start(host, f"{host}{attempt}.log", words, **environment), self.work / f"{host}{attempt}.log"
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.2)
            if process.poll() is None:
                return
            for one in self.on(host):
                with_suppressed(one.kill)
        raise RuntimeError(f"Ray does not start on the {host}: {log.read_text()[-600:]}")

    def start_ray(self, outputs: Path) -> str:
        "A Ray head on one host and a worker on the other, which has `outputs` at another place; the address of the cluster."
        elsewhere = self.work / "mounted" / "elsewhere"
        elsewhere.mkdir(parents=True)
        own = ["--num-gpus=2", "--num-cpus=2", "--object-store-memory=100000000", "--block", *PORTS]
        address = f"{self.addresses['head']}:6379"
        head = ["start", "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={self.temporary}"]
        self.start_patiently("head", [str(RAY), *head, f"--node-ip-address={self.addresses['head']}", *own])
        join = f'mount --bind {outputs} {elsewhere} && exec "$@"'
        self.start_patiently("worker", ["sh", "-c", join, "sh", str(RAY), "start", f"--address={address}",
                                        f"--node-ip-address={self.addresses['worker']}", *own], ESCI_NB_OUTPUTS=str(elsewhere))
        self.start("head", "watch.log", [sys.executable, "-c", WATCH, address])
        wait_for(lambda: 2 in self.alive()["machines"].values, 240, "the worker")
        return address

    def alive(self) -> pd.DataFrame:
        "What the watcher saw: when, and how many machines Ray believed in."
        lines = [line.split() for line in (self.work / "watch.log").read_text().splitlines()]
        seen = [(float(line[0]), int(line[1])) for line in lines if len(line) == 2 and line[1].isdigit()]
        return pd.DataFrame(seen, columns=["when", "machines"])

    def on(self, host: str, word: str = "") -> list[psutil.Process]:
        "The processes of a host, or those with `word` in their command."
        numbers = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout.split()
        found = []
        for number in numbers:
            with contextlib.suppress(psutil.Error):
                one = psutil.Process(int(number))
                if word in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def lose(self, how: str) -> None:
        "Lose the worker: pull its cable, or its power."
        if how == "cable":
            ip("-n", self.names["worker"], "link", "set", self.names["worker"], "down")
        for one in self.on("worker") if how == "power" else []:
            with_suppressed(one.kill)

    def works(self) -> bool:
        "Whether the worker has a run in hand."
        return bool(self.on("worker", "do_packed"))


def ip(*words: str) -> None:
    "Run iproute2."
    subprocess.run(["ip", *words], check=True)


def wait_for(what, seconds: float, name: str) -> None:
    "Wait until something is true."
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name}: waited in vain for {seconds} s")
        time.sleep(0.2)


def grid_words(work: Path, files: Path, outputs: Path, *more: str) -> list[str]:
    "The command of the grid."
    return [sys.executable, "-c", "import sys; from esci_nb.cli import main; sys.exit(main(sys.argv[1:]))", "grid", str(work / "grid.toml"), str(files),
            "--outputs", str(outputs), *more]


def begun(outputs: Path) -> dict[str, int]:
    "How often each run was begun, from its log."
    return {log.stem: log.read_text(errors="replace").count(BEGUN) for log in (outputs / "logs").glob("*.log")}


def held_on(hosts: Hosts, host: str, outputs: Path) -> set[str]:
    "The runs whose lock a process of a host holds."
    numbers = {str(one.pid) for one in hosts.on(host)}
    found = set()
    for lock in outputs.glob("runs/*/LOCK"):
        with contextlib.suppress(OSError):
            if lock.read_text().strip() in numbers:
                found.add(lock.parent.name)
    return found


def run_two_hosts(work: Path, files: Path, how: str = "cable", epochs: int = 6) -> dict:
    "A grid on two hosts, one of which loses its cable or its power in the middle; what happened, in numbers."
    (work / "grid.toml").write_text(GRID.format(epochs=epochs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    local, shared = work / "local" / "outputs", work / "shared" / "outputs"
    shared.mkdir(parents=True)
    start = time.monotonic()
    subprocess.run(grid_words(work, files, local, "--workers", "2"), env=environment, check=True, capture_output=True)
    seen = {"seconds on one machine": time.monotonic() - start}
    with Hosts(work) as hosts:
        address = hosts.start_ray(shared)
        start = time.monotonic()
        grid = hosts.start("head", "grid.log", grid_words(work, files, shared, "--on", "ray", "--address", address))

        def both_work() -> bool:
            assert grid.poll() is None, (work / "grid.log").read_text()
            return len(list(shared.glob("runs/*/DONE"))) >= 2 and bool(held_on(hosts, "worker", shared)) and bool(held_on(hosts, "head", shared))
        wait_for(both_work, 600, "runs on both hosts")
        cut, done, lost = time.time(), {path.parent.name for path in shared.glob("runs/*/DONE")}, held_on(hosts, "worker", shared)
        hosts.lose(how)
        seen |= {"runs": 10, "done before": len(done), "at work on the lost host": len(lost)}
        wait_for(lambda: (hosts.alive()["when"][hosts.alive()["machines"] < 2] > cut).any(), 300, "Ray to notice")
        alive = hosts.alive()
        seen["seconds until Ray noticed"] = alive["when"][(alive["machines"] < 2) & (alive["when"] > cut)].min() - cut
        stopped = None
        while grid.poll() is None:
            if stopped is None and not hosts.works():
                stopped = time.time()
            time.sleep(0.2)
        if stopped is None:
            wait_for(lambda: not hosts.works(), 300, "the lost host to stop")
            stopped = time.time()
        seen |= {"seconds until the lost host had stopped": stopped - cut, "seconds of the whole grid": time.monotonic() - start}
        assert grid.returncode == 0, (work / "grid.log").read_text()[-3000:]
    counts = begun(shared)
    seen |= {"begun again": sum(count > 1 for count in counts.values()), "begun": sum(counts.values()),
             "of these begun only once": sum(counts[name] == 1 for name in lost)}
    expected, found = results(local), results(shared)
    wrong = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
    seen |= {"results": len(expected), "results that differ": len(wrong)}
    return seen


def main() -> int:
    "Once, in a folder of its own; the numbers, and with --to as a table of results."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lose", choices=["cable", "power"], default="cable", help="what the second host loses (cable)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--to", type=Path, help="also write the numbers to this CSV")
    parser.add_argument("--work", type=Path, help="a new folder, which is kept")
    arguments = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    from esci_nb.data.sample import write_sample
    from esci_nb.measure.results import write_result
    work = Path(arguments.work or tempfile.mkdtemp(prefix="two_hosts-"))
    work.mkdir(exist_ok=True)
    write_sample(work / "files", scale=0.0006)
    seen = run_two_hosts(work, work / "files", arguments.lose, arguments.epochs)
    print(*(f"{what}: {value:.4g}" for what, value in seen.items()), sep="\n")
    if arguments.to:
        write_result(pd.DataFrame({"what": seen.keys(), "value": seen.values()}).assign(data="embedded sample, scale 0.0006"), arguments.to, ["small"],
                     f"python tests/two_hosts.py --lose {arguments.lose}")
    if not arguments.work:
        shutil.rmtree(work)
    return 1 if seen["results that differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
