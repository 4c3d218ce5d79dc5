"""Measures training on the GPU of this machine, beside the planner's predictions: python benchmarks/gpu.py

The command needs no network. Base models have the true architectures and random weights (gpu_runs/bases.py). Each
configuration (gpu_runs/cases.py) runs in a process of its own, with a time limit; a failure or a lack of memory is one
row of the table. Those that do not fit the card, according to the planner, are not run. The table goes to docs/gpu.md,
and all numbers to docs/gpu.json, after every configuration. With --check, the command only looks at the machine and
plans, which takes less than a minute.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_runs import page
from gpu_runs.cases import CASES, Case, Check, base_name, overrides, reason_not_to_run
from timings import class_rate, step_end_times, step_seconds

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORKER = HERE / "gpu_runs" / "worker.py"
SHORTEST = 20.0  # seconds; with less time left, no further configuration is started
LOG_LINES = 12  # of a failed process, that gpu.json keeps
PLAN_SECONDS = 150.0
CPU_LIMIT = 8.0  # factor of all limits of processes with --device cpu, which may share its cores


class Session:
    """The processes, files and clock of one measurement."""

    def __init__(self, work: Path, out: Path, limit: float, device: str) -> None:
        self.work, self.out, self.limit = work, out, limit
        self.device = device
        self.patience = CPU_LIMIT if device == "cpu" else 1.0
        self.started = time.monotonic()
        self.results: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cases": [], "checks": []}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - self.elapsed

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:4.0f} s] {text}", flush=True)

    def work_on(self, name: str, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Run worker.py on a job in a new process. Kill it after `seconds`. Return its result."""
        seconds = max(1.0, seconds)
        files = self.work / "jobs"
        files.mkdir(parents=True, exist_ok=True)
        source, target, log = (files / f"{name}.{kind}" for kind in ("job.json", "result.json", "log"))
        target.unlink(missing_ok=True)
        source.write_text(json.dumps(job), "utf-8")
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, str(WORKER), str(source), str(target)], cwd=self.work,
                                       env=self.environment(job), stdout=file, stderr=file, start_new_session=True)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if target.is_file():
            result: dict[str, Any] = json.loads(target.read_text("utf-8"))
            if "error" not in result:
                return result
        elif code is None:
            result = {"error": f"stopped at its limit of {seconds:.0f} s", "stopped": True}
        else:
            reason = f"signal {-code}" if code < 0 else f"exit code {code}"
            result = {"error": f"the process ended with {reason}"}
        lines = log.read_text("utf-8", errors="replace").splitlines()
        return result | {"log": [line[:300] for line in lines[-LOG_LINES:]]}

    def environment(self, job: dict[str, Any]) -> dict[str, str]:
        """Return the environment of a process: that of this one, no network, and caches in the working folder."""
        kept = {key: value for key, value in os.environ.items()
                if key not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING")}
        paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
               "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
               "HF_HOME": str(self.work / "hub"), "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
               "TRITON_CACHE_DIR": str(self.work / "triton")}
        if job["do"] == "check":
            own["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic matrix products
        if self.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return kept | own

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.results["seconds"] = round(self.elapsed)
        for name, text in (("gpu.json", json.dumps(self.results, indent=1) + "\n"),
                           ("gpu.md", page.render(self.results))):
            temporary = self.out / f".{name}"
            temporary.write_text(text, "utf-8")
            temporary.replace(self.out / name)


def find_card(session: Session) -> dict[str, Any]:
    """Return the description of the device.

    Raises:
        SystemExit: packages are missing, or there is no card.
    """
    card = session.work_on("card", {"do": "card", "device": session.device}, PLAN_SECONDS)
    if "error" in card:
        sys.exit(f"there is no usable GPU: {card['error']}\n" + "\n".join(card.get("log", [])))
    if card["missing"]:
        sys.exit(f"install {', '.join(card['missing'])} for {sys.executable}, or add their folder to PYTHONPATH")
    if card["device"] == "cpu" and session.device == "auto":
        sys.exit("there is no GPU here: type --device cpu to try the command with tiny models")
    return card


def prepare(session: Session, cases: list[Case | Check], cuda: bool) -> None:
    """Write the photos, some class images, and the folders of the base models."""
    work = session.work
    shutil.copytree(ROOT / "dreambooth" / "assets" / "demo", work / "photos", dirs_exist_ok=True)
    (work / "class").mkdir(exist_ok=True)
    for number, photo in enumerate(sorted((work / "photos").glob("*.png"))[:4]):
        shutil.copy(photo, work / "class" / f"{number}.png")
    (work / "base").mkdir(exist_ok=True)
    names = sorted({base_name(case, cuda) for case in cases})
    code = ("import sys; from pathlib import Path; from gpu_runs.bases import make_folder\n"
            "for name in sys.argv[2:]: make_folder(name, Path(sys.argv[1]) / name)")
    subprocess.run([sys.executable, "-c", code, str(work / "base"), *names], check=True,
                   env=session.environment({"do": "bases"}))


def job_of(case: Case | Check, card: dict[str, Any], work: Path, do: str, steps: int) -> dict[str, Any]:
    """Return the job of a case for worker.py."""
    folder = work / "runs" / case.name
    own = [f"run_root={folder}", *overrides(case, card, work)]
    if isinstance(case, Case):
        return {"do": do, "folder": str(folder / "run"),
                "overrides": [*own, f"train.max_train_steps={steps}"]}
    base = base_name(case, card["device"] == "cuda")
    return {"do": do, "folder": str(folder), "overrides": own, "steps": steps, "variants": dict(case.variants),
            "partial": str(folder / "partial.json"), "random_weights": not base.startswith("tiny")}


def plan_all(session: Session, cases: list[Case | Check], card: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Plan all cases, several at a time, before anything is measured. Return the plans by name."""
    memory = max(1, int(card.get("host_gib", 8) // 3))  # GiB of host memory per process
    plans: dict[str, dict[str, Any]] = {}
    timed = [case for case in cases if isinstance(case, Case)]

    def one(case: Case) -> tuple[Case, dict[str, Any]]:
        job = job_of(case, card, session.work, "plan", case.steps)
        return case, session.work_on(f"plan-{case.name}", job, session.patience * PLAN_SECONDS)

    with ThreadPoolExecutor(min(len(timed) or 1, os.cpu_count() or 1, memory)) as pool:
        for case, plan in pool.map(one, timed):
            plans[case.name] = plan
            session.say(f"plan of {case.name}: {reason_not_to_run(plan) or describe_plan(plan)}")
    return plans


def describe_plan(plan: dict[str, Any]) -> str:
    return "fits" if plan["card_gib"] is None else f"fits, {plan['card_gib']:.1f} of {plan['usable_vram_gib']:.1f} GiB"


def measure(session: Session, case: Case, card: dict[str, Any], plan: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run one case, and return its row."""
    row: dict[str, Any] = {"name": case.name, "title": case.title, "steps": steps, "plan": plan}
    if reason := reason_not_to_run(plan):
        return row | {"status": reason}
    if session.left < SHORTEST:
        return row | {"status": "not run: the time was over"}
    job = job_of(case, card, session.work, "run", steps)
    folder = Path(job["folder"])
    shutil.rmtree(folder.parent, ignore_errors=True)
    began = time.monotonic()
    found = session.work_on(case.name, job, min(session.patience * case.seconds, session.left))
    row |= {"seconds": round(time.monotonic() - began, 1), "peaks": found.get("peaks", {}),
            "outside_gib": found.get("outside_gib"), "host_gib": found.get("host_gib"), "log": found.get("log", [])}
    ends = step_end_times(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    row |= {"finished_steps": len(ends), "step_seconds": step_seconds(ends)}
    if case.class_images:
        row["class_images_per_second"] = class_rate(folder.parent / "class_images")
    row["overrides"] = job["overrides"]
    shutil.rmtree(folder.parent, ignore_errors=True)
    if "error" in found:
        return row | {"status": f"failed: {found['error']}"}
    return row | {"status": "measured"}


def compare(session: Session, case: Check, card: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run one check, and return its entry."""
    entry: dict[str, Any] = {"name": case.name, "title": case.title, "steps": steps, "rows": {}}
    if session.left < SHORTEST:
        return entry | {"status": "not run: the time was over"}
    job = job_of(case, card, session.work, "check", steps)
    folder = Path(job["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = session.work_on(case.name, job, min(session.patience * case.seconds, session.left))
    if "rows" not in found and Path(job["partial"]).is_file():
        found |= json.loads(Path(job["partial"]).read_text("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    missing = {name: {"error": "not run"} for name in case.variants if name not in found.get("rows", {})}
    status = f"failed: {found['error']}" if "error" in found else "measured"
    return entry | {"rows": found.get("rows", {}) | missing, "status": status, "log": found.get("log", [])}


def one_line(row: dict[str, Any]) -> str:
    """Return the progress line of a row."""
    if "rows" in row:
        equal = sum(bool(one.get("equal")) for one in row["rows"].values())
        return f"{row['name']}: {row['status']}, {equal} of {len(row['rows'])} equal"
    step = "-" if row.get("step_seconds") is None else f"{row['step_seconds']:.3f} s per step"
    return f"{row['name']}: {row['status'][:200]}, {step}, {row.get('seconds', 0):.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="cpu: tiny models, to try the command; needs --out")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--limit", type=float, default=480, help="seconds, after which no configuration is started")
    parser.add_argument("--steps", type=int, help="training steps of each configuration")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gpu", help="folder for all files of the runs")
    parser.add_argument("--out", type=Path, help="folder of gpu.md and gpu.json; default: docs")
    parser.add_argument("--check", action="store_true", help="look at the machine and plan, but measure nothing")
    parser.add_argument("--render", type=Path, metavar="FILE", help="write gpu.md from a gpu.json, and do nothing else")
    options = parser.parse_args()
    if options.out is None and options.device == "cpu":
        parser.error("--device cpu measures no GPU: type --out DIR, because docs/gpu.md is for a GPU")
    out = (options.out or ROOT / "docs").absolute()
    if options.render:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.md").write_text(page.render(json.loads(options.render.read_text("utf-8"))), "utf-8")
        return
    names = options.cases or [case.name for case in CASES]
    if unknown := set(names) - {case.name for case in CASES}:
        parser.error(f"no configuration is named {', '.join(sorted(unknown))}")
    cases = [case for case in CASES if case.name in names]
    session = Session(options.work.absolute(), out, options.limit, options.device)
    session.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # so that the running process is killed
    card = session.results["card"] = find_card(session)
    session.say(f"{card['name']}, {card.get('memory_gib', card['host_gib']):.1f} GiB, driver {card['driver']}, torch "
                f"{card['versions']['torch']}")
    prepare(session, cases, card["device"] == "cuda")
    session.say("photos and base models are ready")
    plans = plan_all(session, cases, card)
    if options.check:
        return
    for case in cases:
        steps = options.steps or case.steps
        if isinstance(case, Case):
            row = measure(session, case, card, plans[case.name], steps)
            session.results["cases"].append(row)
        else:
            row = compare(session, case, card, steps)
            session.results["checks"].append(row)
        session.say(one_line(row))
        session.save()
    session.say(f"wrote {out / 'gpu.md'} and {out / 'gpu.json'}")


if __name__ == "__main__":
    main()
