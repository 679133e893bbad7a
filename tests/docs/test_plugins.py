"""The packages of docs/guides/plugins.md are installed, found by their names in other processes, and keep their contracts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from agentmesh.testing import ValkeyServer
from agentmesh.testing.servers import running_server

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples" / "plugins"
PACKAGES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
PAGE = (ROOT / "docs" / "guides" / "plugins.md").read_text()
CREW = """
from agentmesh import Agent, Crew
class Parrot(Agent):
    "Repeats."
crew = Crew(Parrot(){})
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the five packages, as pip installs them; without a network and without what they depend on."""
    folder = tmp_path_factory.mktemp("site")
    sources = shutil.copytree(EXAMPLES, tmp_path_factory.mktemp("sources") / "plugins")
    argv = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index",
            "--disable-pip-version-check", "--target", str(folder), *[str(sources / name) for name in PACKAGES]]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def environment(site: Path) -> dict[str, str]:
    """Variables of a process that has the packages installed, and no settings of whoever runs the tests."""
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "agents"), str(ROOT / "tools")])
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTMESH_", "OPENAI_"))}
    return ours | {"PYTHONPATH": path}


def run(site: Path, folder: Path, *argv: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of this Python in a folder, with the packages installed; `code` None is any."""
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment(site) | env, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def agentmesh(site: Path, folder: Path, *argv: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    return run(site, folder, "-m", "agentmesh.cli.main", *argv, code=code, **env)


@pytest.mark.parametrize("package", PACKAGES)
def test_it_keeps_its_contract(package: str, site: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / package / f"test_{package}.py", tmp_path)
    done = run(site, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"test_{package}.py")
    assert re.search(r"\d passed", done.stdout)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_shows_it_as_it_is(package: str) -> None:
    for name in ("pyproject.toml", f"{package}.py"):
        text = (EXAMPLES / package / name).read_text()
        assert f"```{'toml' if name.endswith('toml') else 'python'}\n{text}```" in PAGE, f"{package}/{name}"


def test_a_provider_answers_by_its_name_alone(site: Path, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW.format(""))
    done = agentmesh(site, tmp_path, "run", "crew.py", "hello", "--model", "echo:any", "--id", "one")
    assert done.stdout == "any: hello\n"
    assert "echo:any" in agentmesh(site, tmp_path, "runs", "show", "one").stdout
    done = agentmesh(site, tmp_path, "run", "crew.py", "hello", AGENTMESH_MODEL="echo:other")
    assert done.stdout == "other: hello\n"
    (tmp_path / "crew.py").write_text(CREW.format(", model='echo:declared'"))
    done = agentmesh(site, tmp_path, "run", "crew.py", "hello", "--model", "echo:any")
    assert done.stdout == "declared: hello\n"
    assert "--model echo:any is not used: every agent of the crew has a model of its own" in done.stderr


def test_the_doctor_names_what_is_installed(site: Path, tmp_path: Path) -> None:
    shown = run(site, tmp_path, "-m", "agentmesh.cli.main", "doctor", code=None).stdout
    for line in ("model provider 'echo' of echo-model 0.1", "store 'json' of json-store 0.1",
                 "journal scheme 'audited+unix' of audit-journal 0.1", "loader 'ini' of ini-loader 0.1"):  # fmt: skip
        assert f"{line} can be imported" in shown


def test_an_endpoint_serves_a_provider(site: Path, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW.format(", model='echo:any'"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    argv = [
        sys.executable,
        "-m",
        "agentmesh.cli.main",
        "serve",
        "crew.py",
        "--port",
        urlsplit(url).netloc.partition(":")[2],
    ]
    server = subprocess.Popen(argv, cwd=tmp_path, env=environment(site), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert "models Parrot, echo:any" in server.stderr.readline()
        body = json.dumps({"model": "echo:any", "messages": [{"role": "user", "content": "hello"}]}).encode()
        request = Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            assert json.load(response)["choices"][0]["message"]["content"] == "any: hello"
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_a_name_that_nobody_brings_lists_what_there_is(site: Path, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW.format(""))
    done = agentmesh(site, tmp_path, "run", "crew.py", "hello", "--model", "ecco:any", code=4)
    assert "error: unknown model provider 'ecco'" in done.stderr
    assert "use one of: echo, local, openai. Did you mean 'echo'?" in done.stderr


def test_a_journal_is_found_by_its_scheme(site: Path, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW.format(", model='echo:any'"))
    with running_server(ValkeyServer) as server:
        env = {"AGENTMESH_BROKER": server.broker_url, "AGENTMESH_JOURNAL": f"audited+{server.url}"}
        done = agentmesh(site, tmp_path, "run", "crew.py", "hello", "--detach", "--id", "one", **env)
        agentmesh(site, tmp_path, "runs", "tail", "one", **env)
        assert "RunDone" in agentmesh(site, tmp_path, "runs", "show", "one", **env).stdout
        assert done.stdout == "one\n"


def test_documents_go_through_store_embedder_and_loader(site: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "server.ini").write_text("[server]\nport = 8000\n")
    (docs / "tea.md").write_text("# Tea\n\nTea is made in the kitchen.\n")
    place = ("--store", "json:kb.json", "--embed", "letters:any")
    done = agentmesh(site, tmp_path, "rag", "add", "docs", *place)
    assert done.stdout.startswith("2 documents added, 2 passages")
    for mode in ("hybrid", "dense", "text"):
        best = agentmesh(site, tmp_path, "rag", "search", "port 8000", *place, "--mode", mode).stdout.splitlines()[0]
        assert "docs/server.ini" in best
        assert "server" in best
    (docs / "tea.md").unlink()
    assert "1 removed" in agentmesh(site, tmp_path, "rag", "sync", "docs", *place).stdout
    assert (
        "no passage was found"
        in agentmesh(site, tmp_path, "rag", "search", "kitchen", *place, "--mode", "text", code=1).stdout
    )


def test_an_ingest_run_uses_the_embedder_and_the_loader(site: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "server.ini").write_text("[server]\nport = 8000\n")
    done = agentmesh(site, tmp_path, "rag", "add", "docs", "--store", "kb", "--embed", "letters:any")
    assert done.stdout.startswith("1 documents added, 1 passages")
    assert "docs/server.ini" in agentmesh(site, tmp_path, "rag", "search", "port", "--store", "kb").stdout
