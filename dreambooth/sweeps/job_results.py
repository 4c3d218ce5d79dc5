"""Chooses the best of the runs that SageMaker jobs have finished, from the results that the jobs have stored.

A job stores its result in S3 as single files. The SageMaker SDK's local mode stores it as an archive, model.tar.gz.
"""

import math
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dreambooth.cloud.pipeline_requests import BEST_FILE
from dreambooth.config.storage import is_remote
from dreambooth.errors import UserError
from dreambooth.storage import folders
from dreambooth.sweeps.promotion import PromotionOptions, choose_best
from dreambooth.sweeps.trials import load_trial
from dreambooth.utils import atomic_files

FILES = ("run.json", "result.json")  # what is needed of a result
JOB_OUTPUT = "output/model"  # folder of a job's result, below the folder of the job
ARCHIVE = "model.tar.gz"
# A model whose class_similarity was not measured may be chosen: its registered version waits for a person's approval.
RULES = PromotionOptions(allow_unmeasured=True, key_prefix="evaluate.")


def choose(results: str, out: Path) -> str:
    """Choose the result with the best objective, by the rules of a promotion, and write BEST_FILE to `out`.

    Args:
        results: local folder or S3 folder that contains the results of all jobs of a sweep. Jobs without a result,
            such as failed ones, are ignored.

    Returns:
        A sentence that names the chosen result.

    Raises:
        UserError: there is no result, or no result satisfies the rules of a promotion.
    """
    with tempfile.TemporaryDirectory() as temporary:
        addresses, trials = {}, []
        for number, (address, files) in enumerate(_find_results(results)):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            trial = load_trial(folder)
            if trial.result is not None:
                addresses[folder] = address
                trials.append(trial)
        if not trials:
            raise UserError(f"there is no result of a job in {results or 'the folder'}: see the logs of the training "
                            "jobs, or type --results DIR")
        best, name = choose_best(trials, results, RULES)
        address, objective = addresses[best.folder], best.objective(name)
        # Texts, because properties of a registered model are texts.
        atomic_files.write_json(out / BEST_FILE, {
            "model": address, "objective": f"{objective:.6g}", "name": best.objective_name,
            "finished": str(sum(math.isfinite(trial.objective(best.objective_name)) for trial in trials))})
        return f"the best of {len(trials)} results is {address}, {best.objective_name}={objective:.6g}"


def _find_results(results: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the address of each result, and the content of FILES of this result, by name."""
    if is_remote(results):
        contents = folders.read_files(results, lambda name: name.endswith(tuple(f"/{JOB_OUTPUT}/{x}" for x in FILES)))
        for folder in sorted({name.rpartition("/")[0] for name in contents}):
            yield f"{results.rstrip('/')}/{folder}/", {
                name: contents[f"{folder}/{name}"] for name in FILES if f"{folder}/{name}" in contents}
        return
    for path in sorted(Path(results or ".").rglob(ARCHIVE)):
        yield str(path), _read_archive(path)


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the content of FILES in an archive, by name."""
    try:
        with tarfile.open(path) as archive:
            members = {name: member for member in archive.getmembers()
                       if (name := member.name.removeprefix("./")) in FILES and member.isfile()}
            return {name: file.read() for name, member in members.items()
                    if (file := archive.extractfile(member)) is not None}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} is not a complete archive: delete it, or run its job again") from error
