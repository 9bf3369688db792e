"""infra/aws: what `ray up` is given passes Ray's schema and its start against an EC2 of our own."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.deployed import INFRA, KUBERNETES, base_objects, pods

CLUSTER = INFRA / "aws" / "cluster.yaml"


def cluster() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return found


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults, held against Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(config)
    validate_config(whole)
    return dict(whole)


class TestCluster:
    def test_it_fits_the_schema_of_ray(self) -> None:
        whole = prepared(cluster())
        assert whole["available_node_types"]["head"]["max_workers"] == 0

    def test_the_schema_finds_what_a_node_type_lacks(self) -> None:
        config = cluster()
        del config["available_node_types"]["gpu"]["resources"]
        with pytest.raises(jsonschema.ValidationError, match="'resources' is a required property"):
            prepared(config)

    def test_ray_starts_from_it_and_opens_nothing(
        self, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `ray up` does before the first instance, on moto's EC2. A group that Ray makes opens SSH to all."""
        import boto3
        from ray.autoscaler._private.aws.config import bootstrap_aws

        monkeypatch.setenv("HOME", str(tmp_path))  # the key pair is written there
        (tmp_path / ".ssh").mkdir()
        ec2 = boto3.client("ec2", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
        group = ec2.create_security_group(GroupName=tmp_path.name, Description="ours")["GroupId"]
        before = ec2.describe_security_groups()["SecurityGroups"]
        config = bootstrap_aws(prepared(yaml.safe_load(CLUSTER.read_text().replace("sg-CHANGE", group))))
        for kind, profile in (("head", "ldm-ray-head"), ("gpu", "ldm-ray-worker")):
            node = config["available_node_types"][kind]["node_config"]
            assert node["SubnetIds"] and node["KeyName"] and node["SecurityGroupIds"] == [group]
            assert node["IamInstanceProfile"] == {"Name": profile}
        assert ec2.describe_security_groups()["SecurityGroups"] == before

    def test_workers_are_spot_and_the_head_is_not(self) -> None:
        types = cluster()["available_node_types"]
        assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert types["gpu"]["min_workers"] == 0
        assert "InstanceMarketOptions" not in types["head"]["node_config"]
        assert types["head"]["resources"] == {"CPU": 0}

    def test_the_token_is_on_and_travels_as_a_file(self) -> None:
        config = cluster()
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
        start = " ".join(config["head_start_ray_commands"])
        assert "--dashboard-host=127.0.0.1" in start
        assert all(secret not in CLUSTER.read_text() for secret in ("PASSWORD=", "AUTH_TOKEN=", "SECRET_ACCESS"))

    def test_metadata_and_disks_are_guarded(self) -> None:
        for kind in cluster()["available_node_types"].values():
            assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
            assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


class TestHeadPolicy:
    def test_it_passes_on_the_workers_role_alone_and_ends_its_own_nodes_alone(self) -> None:
        policy = json.loads((INFRA / "aws" / "head-policy.json").read_text())
        by_action = {
            action: statement
            for statement in policy["Statement"]
            for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        }
        profile = cluster()["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
        assert by_action["iam:PassRole"]["Resource"].endswith(f"role/{profile}")
        tag = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster()["cluster_name"]}}
        assert by_action["ec2:TerminateInstances"]["Condition"] == tag
        assert not any("*" in action for action in by_action)


def test_the_gpu_nodes_take_the_pods_that_want_them() -> None:
    """Karpenter's own schema is not here: this holds the node pool against our pods."""
    template = yaml.safe_load((INFRA / "aws" / "nodepool.yaml").read_text())["spec"]["template"]["spec"]
    offered = {each["key"]: each["values"] for each in template["requirements"]}
    every = [pod for each in base_objects() for pod in pods(each)]
    wanting = [pod for pod in every if "karpenter.sh/capacity-type" in pod.get("nodeSelector", {})]
    assert len(wanting) == 2
    for pod in wanting:
        assert pod["nodeSelector"]["karpenter.sh/capacity-type"] in offered["karpenter.sh/capacity-type"]
        tolerated = {(each["key"], each["effect"]) for each in pod["tolerations"]}
        assert {(taint["key"], taint["effect"]) for taint in template["taints"]} <= tolerated


def test_a_disk_is_made_for_postgresql() -> None:
    """A claim that names no class gets the default one, and Auto Mode makes disks for its own provisioner alone."""
    made = yaml.safe_load((INFRA / "aws" / "storageclass.yaml").read_text())
    kubernetes_validate.validate(made, KUBERNETES, strict=True)
    assert made["provisioner"] == "ebs.csi.eks.amazonaws.com" and made["parameters"]["encrypted"] == "true"
    assert made["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    claims = [claim for each in base_objects() for claim in each.get("spec", {}).get("volumeClaimTemplates", [])]
    assert len(claims) == 1 and "storageClassName" not in claims[0]["spec"]
