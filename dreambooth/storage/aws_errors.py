"""Turns an AWS error into a message of one sentence that ends with the command or option to type.

Errors are recognised by class name and error code, so that this file does not import boto3.
"""

import os
from typing import Any

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
INVALID_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "UnrecognizedClientException",
                "InvalidClientTokenId"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "TokenRetrievalError",
           "UnauthorizedSSOTokenError", "SSOTokenLoadError", "LoginRefreshRequired", "LoginTokenLoadError"}
DENIED = {"AccessDenied", "AccessDeniedException", "403", "Forbidden", "AllAccessDisabled", "KMS.DisabledException",
          "UnauthorizedOperation"}
WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307",
             "TemporaryRedirect"}
NETWORK = {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError",
           "ResponseStreamingError", "IncompleteReadError", "HTTPClientError", "ProxyConnectionError", "SSLError",
           "ProtocolError", "ConnectionError", "ConnectionResetError", "IncompleteRead",
           "TimeoutError", "BrokenPipeError", "ResponseParserError"}
BUSY = {"InternalError", "InternalFailure", "ServiceUnavailable", "SlowDown", "RequestTimeout", "500", "502", "503",
        "504", "Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded",
        "ConditionalRequestConflict"}
MISSING = {"404", "NoSuchKey", "NotFound"}
PRECONDITION_FAILED = {"PreconditionFailed", "412"}
DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "InvalidDigest", "XAmzContentChecksumMismatch",
           "FlexibleChecksumError"}
LOGIN_ADVICE = "type aws configure, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"


def _response(error: BaseException) -> dict[str, Any]:
    return getattr(error, "response", None) or {}


def _is_server_error(error: BaseException) -> bool:
    status: int = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return 500 <= status < 600


def error_code(error: BaseException) -> str:
    """Return the error code in the response of AWS, or the name of the exception class if AWS did not respond."""
    return str(_response(error).get("Error", {}).get("Code") or type(error).__name__)


def is_transient(error: BaseException) -> bool:
    """Return whether the failed call may succeed if it is repeated a moment later."""
    return error_code(error) in NETWORK | BUSY | DAMAGED or _is_server_error(error)


def may_have_been_received(error: BaseException) -> bool:
    """Return whether AWS may have carried out the failed call: its answer was lost, or it failed on the way."""
    return is_network_error(error) or _is_server_error(error)


def is_network_error(error: BaseException) -> bool:
    """Return whether the call got no response from AWS, so that the network is the likely cause."""
    return error_code(error) in NETWORK


def needs_login(error: BaseException) -> bool:
    """Return whether the credentials are missing, invalid or expired, so that only a new login helps."""
    return error_code(error) in NO_CREDENTIALS | INVALID_KEYS | EXPIRED


def is_missing(error: BaseException) -> bool:
    """Return whether S3 has answered that an object does not exist."""
    return error_code(error) in MISSING


def may_answer_later(error: BaseException | None) -> bool:
    """Return whether the failed call may succeed later: it is transient, or a login that can be renewed has expired."""
    return error is not None and (is_transient(error) or (needs_login(error) and login_can_be_renewed()))


def login_can_be_renewed() -> bool:
    """Return whether a login in another terminal takes effect in this process.

    It has no effect if environment variables hold the credentials, because these variables take precedence over the
    login.
    """
    return "AWS_ACCESS_KEY_ID" not in os.environ


def is_aws_error(error: BaseException) -> bool:
    """Return whether AWS or its client libraries raised the error. Any other error is a bug of this package."""
    return hasattr(error, "response") or type(error).__module__.startswith(("botocore", "boto3", "urllib3", "http")) \
        or error_code(error) in NETWORK | DAMAGED


def describe_error(error: BaseException, permission: str, where: str, bucket: str | None = None) -> str:
    """Return one sentence that describes why a call failed and what to type.

    Args:
        permission: the IAM action that the call needs, such as s3:GetObject.
        where: the S3 object or the AWS service of the call.
        bucket: the bucket of the call; None if the call was not to S3.
    """
    code = error_code(error)
    if code in NO_CREDENTIALS:
        return f"there are no AWS credentials for {where}: {LOGIN_ADVICE}"
    if code in INVALID_KEYS:
        return f"AWS does not accept these credentials ({code}): {LOGIN_ADVICE}"
    if code in EXPIRED:
        return f"the AWS login has expired ({code}): " + (
            "type aws sso login in another terminal, or log in there as you did before" if login_can_be_renewed() else
            "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN again")
    if code == "NoSuchBucket":
        return f"bucket {bucket} does not exist: type another name, or create it with aws s3 mb s3://{bucket}"
    # Without the permission s3:ListBucket, AWS returns this error for an object that does not exist, too.
    if code in DENIED and permission == "s3:GetObject":
        return (f"no permission for s3:GetObject on {where}, or it does not exist and there is no permission for "
                f"s3:ListBucket on {bucket}: add both to your policy; docs/sagemaker.md has the complete policy")
    if code in DENIED:
        return (f"no permission for {permission} on {where}: add it to your policy; docs/sagemaker.md has the complete "
                "policy")
    if code in WRONG_REGION:
        return f"bucket {bucket} is in {_region(error)}: set AWS_DEFAULT_REGION to it and repeat the command"
    if code == "NoRegionError":
        return f"there is no AWS region for {where}: set AWS_DEFAULT_REGION, such as AWS_DEFAULT_REGION=us-east-1"
    if code in NETWORK | BUSY:
        return (f"AWS did not answer {permission} on {where} ({code}) after several attempts: "
                "repeat the command, which continues where it stopped")
    if code in DAMAGED:
        return (f"{where} arrived damaged several times ({code}): repeat the command, which continues where it "
                "stopped")
    if code in PRECONDITION_FAILED:
        return f"{where} changed while it was read: repeat the command"
    if code == "NoSuchUpload":
        return f"the unfinished upload of {where} no longer exists: repeat the command"
    text = " ".join(str(error).split())
    return f"{permission} on {where} failed ({text[:300]}): fix that and repeat the command"


def _region(error: BaseException) -> str:
    headers = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = _response(error).get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return f"the region {region}" if region else "another region"
