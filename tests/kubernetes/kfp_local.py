"""Runs workflows/kubeflow/pipeline.yaml with kfp's own local runner. A test starts it in a separate environment,
because kfp requires older packages than this project:

    python kfp_local.py PIPELINE IMAGE FOLDER KEY=VALUE...
"""

import json
import sys
from pathlib import Path

import yaml
from google.protobuf import json_format
from kfp import components, local
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2


def main() -> None:
    pipeline, image, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    spec, platform = yaml.safe_load_all(pipeline.read_text("utf-8"))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())  # here and below, an unknown key is an error
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image
        executor["container"].pop("resources", None)  # the test machine needs no GPU
    (folder / "workspace").mkdir()
    (folder / "pipeline.yaml").write_text(yaml.safe_dump_all([spec, platform]), "utf-8")
    local.init(runner=local.DockerRunner(network_mode="none"), pipeline_root=str(folder / "root"),
               workspace_root=str(folder / "workspace"), raise_on_error=True)
    run = components.load_component_from_file(str(folder / "pipeline.yaml"))
    task = run(**dict(arg.split("=", 1) for arg in sys.argv[4:]))
    print(json.dumps({"outputs": sorted(task.outputs)}))


if __name__ == "__main__":
    main()
