"""What AWS answers, as one sentence that says what to type. Known by name and code: boto3 is not needed here."""

import os
from typing import Any

CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "UnrecognizedClientException",
                "InvalidClientTokenId"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "TokenRetrievalError",
           "UnauthorizedSSOTokenError", "SSOTokenLoadError", "LoginRefreshRequired", "LoginTokenLoadError"}
DENIED = {"AccessDenied", "AccessDeniedException", "403", "Forbidden", "AllAccessDisabled", "KMS.DisabledException",
          "UnauthorizedOperation"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307",
             "TemporaryRedirect"}
NETWORK = {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError",
           "ResponseStreamingError", "IncompleteReadError", "HTTPClientError", "ProxyConnectionError", "SSLError",
           "ProtocolError", "ConnectionError", "ConnectionResetError", "IncompleteRead",
           "TimeoutError", "BrokenPipeError", "ResponseParserError"}
BUSY = {"InternalError", "InternalFailure", "ServiceUnavailable", "SlowDown", "RequestTimeout", "500", "502", "503",
        "504", "Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded",
        "ConditionalRequestConflict"}
CHANGED = {"PreconditionFailed", "412"}
DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "InvalidDigest", "XAmzContentChecksumMismatch",
           "FlexibleChecksumError"}
LOGIN = ("type aws configure, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role")


def _answer(error: BaseException) -> dict[str, Any]:
    return getattr(error, "response", None) or {}


def code(error: BaseException) -> str:
    """The code of what AWS answered, or the name of the error if it did not answer."""
    return str(_answer(error).get("Error", {}).get("Code") or type(error).__name__)


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code(error) in NETWORK | BUSY | DAMAGED or 500 <= status < 600


def no_network(error: BaseException) -> bool:
    """Whether nothing answered."""
    return code(error) in NETWORK


def logged_out(error: BaseException) -> bool:
    """Whether a new login may help, and nothing else."""
    return code(error) in CREDENTIALS | REFUSED_KEYS | EXPIRED


def renewable() -> bool:
    """Whether a login in another terminal reaches this process: its own environment wins over it."""
    return "AWS_ACCESS_KEY_ID" not in os.environ


def known(error: BaseException) -> bool:
    """Whether AWS or its library said it: anything else is a fault of ours."""
    return hasattr(error, "response") or type(error).__module__.startswith(("botocore", "boto3", "urllib3", "http")) \
        or code(error) in NETWORK | DAMAGED


def sentence(error: BaseException, doing: str, where: str, bucket: str | None = None) -> str:
    """Why it failed and what to type.

    Args:
        doing: the permission that the call needs, such as s3:GetObject.
        where: what it was about.
        bucket: of a call to S3.
    """
    said = code(error)
    if said in CREDENTIALS:
        return f"there are no AWS credentials for {where}: {LOGIN}"
    if said in REFUSED_KEYS:
        return f"AWS does not accept these credentials ({said}): {LOGIN}"
    if said in EXPIRED:
        return f"the AWS login has ended ({said}): " + (
            "type aws sso login in another terminal, or log in there as you did before" if renewable() else
            "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN anew")
    if said == "NoSuchBucket":
        return f"there is no bucket {bucket}: type another name, or make it by aws s3 mb s3://{bucket}"
    if said in DENIED and doing == "s3:GetObject":  # so is answered who may not list and asks for what is not there
        return (f"no permission for s3:GetObject on {where}, or it is not there and there is none for s3:ListBucket on "
                f"{bucket}: add both to your policy; docs/sagemaker.md has the whole of it")
    if said in DENIED:
        return f"no permission for {doing} on {where}: add it to your policy; docs/sagemaker.md has the whole of it"
    if said in ELSEWHERE:
        return f"bucket {bucket} is in {_region(error)}: set AWS_DEFAULT_REGION to it and repeat the command"
    if said == "NoRegionError":
        return f"there is no AWS region for {where}: set AWS_DEFAULT_REGION, such as AWS_DEFAULT_REGION=us-east-1"
    if said in NETWORK | BUSY:
        return (f"AWS did not answer {doing} on {where} ({said}) after several attempts: "
                "repeat the command, it goes on where it stopped")
    if said in DAMAGED:
        return f"{where} arrived damaged several times ({said}): repeat the command, it goes on where it stopped"
    if said in CHANGED:
        return f"{where} has changed while it was read: repeat the command"
    if said == "NoSuchUpload":
        return f"the unfinished upload of {where} is gone: repeat the command"
    text = " ".join(str(error).split())
    return f"{doing} on {where} failed ({text[:300]}): mend that and repeat the command"


def _region(error: BaseException) -> str:
    headers = _answer(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    found = _answer(error).get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return f"the region {found}" if found else "another region"
