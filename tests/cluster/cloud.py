"""An AWS of one's own: EC2, IAM and S3 by moto, with what a user makes there before `ray up`.

A program, run on the lab's laptop: `python cloud.py PUBLIC_KEY_FILE`. Its first line is JSON: what was made.
Then comes a line whenever machines change: their states by address.
"""

import json
import logging
import sys
import time
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

ADDRESS, PORT = "10.200.77.1", 5566
REGION, BUCKET = "us-west-2", "lab-bucket"
VARIABLES = {
    "AWS_ENDPOINT_URL": f"http://{ADDRESS}:{PORT}",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t",
}


def make_account(public_key: bytes) -> dict[str, str]:
    """A network, a key, a bucket, and what cluster/aws-account.yaml makes."""
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    boto3.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    vpc = ec2.create_vpc(CidrBlock="10.200.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.200.77.0/24", AvailabilityZone=f"{REGION}a")
    ec2.import_key_pair(KeyName="lab", PublicKeyMaterial=public_key)
    group = ec2.create_security_group(GroupName="lab", Description="lab", VpcId=vpc)["GroupId"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    for name in ("ray-ddpm-head", "ray-ddpm-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    images = ec2.describe_images(Filters=[{"Name": "architecture", "Values": ["x86_64"]}])["Images"]
    image = min(image["ImageId"] for image in images)
    return {"subnet": subnet["Subnet"]["SubnetId"], "group": group, "image": image}


def states() -> dict[str, str]:
    """Of every machine, by its address; one that is ended keeps its line."""
    found = {}
    for reservation in boto3.client("ec2").describe_instances()["Reservations"]:
        for machine in reservation["Instances"]:
            found[machine["PrivateIpAddress"]] = machine["State"]["Name"]
    return found


def main(public_key_file: str) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(ip_address=ADDRESS, port=PORT, verbose=False).start()
    print(json.dumps(make_account(Path(public_key_file).read_bytes())), flush=True)
    before: dict[str, str] = {}
    while True:
        if (now := states()) != before:
            print(json.dumps(now), flush=True)
            before = now
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1])
