"""jobset.yaml, as it ships, against the schema of JobSet and of Kubernetes' pods."""

from pathlib import Path

import yaml

from megamoe.config.model import load_preset
from megamoe.config.run import parse_run
from megamoe.launch.codes import REFUSED

ROOT = Path(__file__).parent.parent.parent
MANIFEST = yaml.safe_load((ROOT / "launch_scripts" / "jobset.yaml").read_text())


def unknown(given, known, path=""):
    """Keys of `given` that the schema has dropped or changed."""
    if isinstance(given, dict):
        known = known if isinstance(known, dict) else {}
        return [bad for key in given for bad in unknown(given[key], known.get(key), f"{path}.{key}")]
    if isinstance(given, list):
        known = known if isinstance(known, list) else []
        known += [None] * (len(given) - len(known))
        return [bad for index, one in enumerate(given) for bad in unknown(one, known[index], f"{path}[{index}]")]
    return [] if given == known else [path]


def container():
    (job,) = MANIFEST["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_every_field_is_one_of_the_schema_with_a_value_of_its_type():
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    assert unknown(MANIFEST, JobsetV1alpha2JobSet.from_dict(MANIFEST).to_dict()) == []


def test_the_pods_run_a_shipped_script_with_options_that_there_are():
    assert (ROOT / container()["command"][0]).is_file()
    run = parse_run(container()["args"])
    assert run.auto_resume
    assert (ROOT / run.ds_config).is_file()
    load_preset(run.preset)


def test_the_script_waits_for_all_pods_and_they_join_at_the_first():
    pods = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]
    values = {variable["name"]: variable["value"] for variable in container()["env"]}
    assert values["HOSTS"] == str(pods["parallelism"]) == str(pods["completions"])
    name = MANIFEST["metadata"]["name"]
    assert values["ENDPOINT"].startswith(f"{name}-{MANIFEST['spec']['replicatedJobs'][0]['name']}-0-0.{name}:")
    assert values["RANKS"] == container()["resources"]["limits"]["nvidia.com/gpu"]


def test_the_job_set_is_restarted_for_all_exit_codes_but_that_of_what_the_user_must_change():
    spec = MANIFEST["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container()["name"], "operator": "In", "values": [REFUSED]}
    (refused,) = spec["failurePolicy"]["rules"]
    assert (refused["action"], refused["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # Kubernetes takes such a policy only for pods that do not restart by themselves.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > 0
