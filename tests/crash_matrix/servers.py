"""Rollout servers that are lost while a run uses them: killed and started again, hung and continued; the run too."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests import failpoints, forked
from tests.crash_matrix.attempts import LIMIT, Attempt, attempt, difference, fingerprint
from tests.crash_matrix.cases import Outcome, Setting
from tests.train.runs import SMALL, environment

#: RL alone: six steps, a checkpoint every second one, one evaluation.
RECIPE = (
    *SMALL, "sft.enabled=false", "rl.init=base", "compare.sft_continued=false", "rl.max_steps=6", "eval.beams=4",
    "trainer.save_interval=2", "data.eval_limit=8", "eval.splits=[valid]", "rollout.placement=server",
    "rollout.server_silent_s=2", f"rollout.server_wait_s={LIMIT}",
)  # fmt: skip
#: Model calls of one server in a step are a few: these lie inside searches of the first and of a later step.
KILLED, HUNG = "server.searching=kill@2", "server.searching=stop@12"
HANGS_S = 5.0


@dataclass
class Server:
    """One server: a process that is started again whenever it ends, and continued when it was stopped."""

    run_dir: Path
    words: Sequence[str]
    rules: list[str] = field(default_factory=list)  # of its first start, its second, ...
    codes: list[int] = field(default_factory=list)
    hangs: int = 0
    _process: ForkServerProcess | None = None
    _over: bool = False

    @property
    def file(self) -> Path:
        return self.run_dir / "serve" / "address.json"

    def start(self) -> None:
        self._begin()
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    def wait(self) -> None:
        """Until it answers for the first time."""
        end = time.monotonic() + LIMIT
        while not self.file.is_file() or json.loads(self.file.read_text())["pid"] != self._pid:
            assert time.monotonic() < end, f"a server did not start: {self.run_dir}.log"
            time.sleep(0.05)

    def end(self) -> None:
        self._over = True
        self._supervisor.join()

    @property
    def _pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def _begin(self) -> None:
        env = {**environment(), failpoints.VARIABLE: self.rules.pop(0) if self.rules else ""}
        words = ["serve", *self.words, f"run_dir={self.run_dir}", "serve.port=0", "serve.control_port=0"]
        self._process = forked.start(forked.verb, words, env, Path(f"{self.run_dir}.{len(self.codes)}.log"))

    def _supervise(self) -> None:
        while not self._over:
            assert self._process is not None
            self._process.join(0.05)
            if self._process.exitcode is not None:
                self.codes.append(self._process.exitcode)
                self._begin()
            elif Path(f"/proc/{self._pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T":
                self.hangs += 1
                time.sleep(HANGS_S)
                os.kill(self._pid, signal.SIGCONT)
        assert self._process is not None
        self._process.kill()
        self._process.join()


def lost_server(world: Setting, name: str) -> Outcome:
    """Two servers: one is killed in the middle of a search and started again, the other hangs for a while; then the run
    itself is killed and goes on with them. It must equal a run on two servers that nothing happened to."""
    folder = world.folder / name
    folder.mkdir()
    files = [folder / one / "serve" / "address.json" for one in "ab"]
    words = [*RECIPE, f"data.root={world.data}", f"rollout.servers=[{','.join(map(str, files))}]"]

    def on_servers(
        run: str, rules: Sequence[Sequence[str]], kills: Sequence[str]
    ) -> tuple[list[Attempt], list[Server]]:  # fmt: skip
        servers = [Server(folder / one, words, list(own)) for one, own in zip("ab", rules, strict=True)]
        for server in servers:
            server.file.unlink(missing_ok=True)
            server.start()
        try:
            for server in servers:
                server.wait()
            overrides = [*words, f"run_dir={folder / run}"]
            return [attempt(overrides, rules=rule, words=("train",)) for rule in (*kills, "")], servers
        finally:
            for server in servers:
                server.end()

    [whole], _ = on_servers("whole", ([], []), ())
    runs, servers = on_servers("lost", ([KILLED], [HUNG]), ("rl.after_rollout=kill@5",))
    said = "".join(run.said for run in runs)
    checks = {
        "an undisturbed run": whole.code == 0 and "is excluded" not in whole.said,
        "the run's kill and its end": [run.code for run in runs] == [-signal.SIGKILL, 0],
        "a server's kill": servers[0].codes == [-signal.SIGKILL],
        "a server's hang": servers[1].hangs == 1 and "has not answered /health" in said,
        "both servers' loss in the run": said.count("is excluded until it receives new weights") >= 2,
    }
    missing = [check for check, seen in checks.items() if not seen]
    problem = f"not seen: {', '.join(missing)}: {runs[-1].last_words}" if missing else ""
    changed = difference(folder / "lost", fingerprint(folder / "whole"))
    problem = problem or (f"differs from the undisturbed run: {changed}" if changed else "")
    points = ("server.searching", "a server killed", "a server hung", "rl.after_rollout")
    codes = (whole.code, *(run.code for run in runs), *servers[0].codes)
    return Outcome(name, points, codes, problem, sum(run.seconds for run in (whole, *runs)))
