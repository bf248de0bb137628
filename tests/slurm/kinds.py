"""JSON Schemas of the Kubernetes kinds that slurm/kubernetes writes: the fields in use, and no others.

Written after the API references (apps/v1, v1, policy/v1, jobset.x-k8s.io/v1alpha2, kubeflow.org/v1). A field that is
misspelled, or stands at the wrong place, is refused: ``additionalProperties`` is false everywhere but in labels.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def mapping(required: str = "", **properties: Schema) -> Schema:
    """An object of these properties; ``required``: names of those that must be there."""
    return {
        "type": "object", "additionalProperties": False, "properties": properties, "required": required.split(),
    }  # fmt: skip


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string", "minLength": 1}
PATH: Schema = {"type": "string", "pattern": "^/"}
#: Names of objects that other objects find over DNS (RFC 1123), and quantities of memory or cores.
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}
LABELS: Schema = {
    "type": "object",
    "patternProperties": {r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$": {"type": "string"}},
    "additionalProperties": False,
}
METADATA = mapping("name", name=NAME, labels=LABELS)
WORDS: Schema = {"type": "array", "items": {"type": "string"}}
PROBE = mapping(
    "httpGet periodSeconds failureThreshold",
    httpGet=mapping("path port", path=PATH, port={"enum": ["http"]}),
    periodSeconds=SECONDS, timeoutSeconds=SECONDS, failureThreshold=SECONDS,
)  # fmt: skip
CONTAINER = mapping(
    "name image command resources volumeMounts",
    name=NAME, image=TEXT, command=listed(TEXT), args=WORDS,
    env=listed(mapping("name value", name={"type": "string", "pattern": "^[A-Z_]+$"}, value={"type": "string"})),
    ports=listed(mapping("name containerPort", name=NAME, containerPort=SECONDS)),
    startupProbe=PROBE, readinessProbe=PROBE, livenessProbe=PROBE,
    lifecycle=mapping("preStop", preStop=mapping("exec", exec=mapping("command", command=listed(TEXT)))),
    securityContext=mapping(
        allowPrivilegeEscalation={"const": False}, capabilities=mapping("drop", drop={"const": ["ALL"]})
    ),
    resources=mapping(
        "requests limits",
        requests=mapping("cpu memory", cpu=QUANTITY, memory=QUANTITY),
        limits=mapping("memory", memory=QUANTITY, **{"nvidia.com/gpu": SECONDS}),
    ),
    volumeMounts=listed(mapping("name mountPath", name=NAME, mountPath=PATH, readOnly=FLAG)),
)  # fmt: skip
VOLUME: Schema = {
    **mapping(
        "name", name=NAME,
        persistentVolumeClaim=mapping("claimName", claimName=NAME, readOnly=FLAG),
        secret=mapping("secretName", secretName=NAME, defaultMode={"type": "integer", "maximum": 0o777}),
        emptyDir=mapping(medium={"const": "Memory"}),
    ),
    "minProperties": 2, "maxProperties": 2,
}  # fmt: skip
POD = mapping(
    "containers volumes terminationGracePeriodSeconds",
    restartPolicy={"enum": ["Never", "OnFailure", "Always"]}, terminationGracePeriodSeconds=SECONDS,
    securityContext=mapping(runAsNonRoot={"const": True}, runAsUser=SECONDS, fsGroup=SECONDS),
    containers={**listed(CONTAINER), "maxItems": 1}, volumes=listed(VOLUME),
)  # fmt: skip
TEMPLATE = mapping("metadata spec", metadata=mapping("labels", labels=LABELS, annotations=LABELS), spec=POD)
SELECTOR = mapping("matchLabels", matchLabels={**LABELS, "minProperties": 1})
JOB = mapping(
    "parallelism completions completionMode template",
    parallelism=SECONDS, completions=SECONDS, completionMode={"const": "Indexed"}, backoffLimit=COUNT,
    template=TEMPLATE,
)  # fmt: skip
REPLICA = mapping(
    "replicas restartPolicy template",
    replicas=SECONDS, restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]}, template=TEMPLATE,
)  # fmt: skip


def kind(name: str, version: str, spec: Schema) -> Schema:
    return mapping(
        "apiVersion kind metadata spec",
        apiVersion={"const": version}, kind={"const": name}, metadata=METADATA, spec=spec,
    )  # fmt: skip


#: Every kind by its name.
KINDS = {
    "Deployment": kind("Deployment", "apps/v1", mapping(
        "replicas selector template",
        replicas=COUNT, selector=SELECTOR, template=TEMPLATE,
        strategy=mapping(
            "type", type={"const": "RollingUpdate"},
            rollingUpdate=mapping(maxUnavailable=COUNT, maxSurge={"type": "integer", "minimum": 1}),
        ),
    )),
    "Service": kind("Service", "v1", mapping(
        "selector ports",
        selector={**LABELS, "minProperties": 1},
        ports=listed(mapping("port targetPort", name=NAME, port=SECONDS, targetPort={"enum": ["http"]})),
    )),
    "PodDisruptionBudget": kind("PodDisruptionBudget", "policy/v1", mapping(
        "maxUnavailable selector", maxUnavailable=COUNT, selector=SELECTOR,
    )),
    "JobSet": kind("JobSet", "jobset.x-k8s.io/v1alpha2", mapping(
        "replicatedJobs",
        network=mapping(enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG),
        failurePolicy=mapping("maxRestarts", maxRestarts=COUNT),
        replicatedJobs=listed(mapping(
            "name replicas template", name=NAME, replicas=SECONDS, template=mapping("spec", spec=JOB)
        )),
    )),
    "PyTorchJob": kind("PyTorchJob", "kubeflow.org/v1", mapping(
        "pytorchReplicaSpecs",
        runPolicy=mapping(cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit=COUNT),
        pytorchReplicaSpecs=mapping("Master", Master={**REPLICA, "properties": {
            **REPLICA["properties"], "replicas": {"const": 1},
        }}, Worker=REPLICA),
    )),
}  # fmt: skip
