"""The error that every function of this package raises, and the masking of what it quotes."""

__all__ = ["TrackingError"]

# A quoted value is cut here: enough to recognise it, too little to fill a log.
_SHOWN_CHARACTERS = 200

# Masking looks no further than this, since a variable may hold 100 kB.
_MASKED_CHARACTERS = 4_000

# Each pattern keeps its first group and replaces what follows, which may be a secret.
_SECRETS = (
    # User info of a URL, up to its last "@": a secret key may itself hold "/" or "@". What stands there in Azure's
    # wasbs://container@account and abfs://container@account is none, unless it has a password.
    r"((?<!wasb)(?<!wasbs)(?<!abfs)(?<!abfss):(?:\\?/){2})[^\s\"'<>]*@",
    r"(:(?:\\?/){2})[^\s\"'<>]*:[^\s\"'<>]*@",
    # Query of a URL: signed URLs carry their signature there.
    r"(:(?:\\?/){2}[^\s\"'?]*\?)[^\s\"']+",
    # "secret_key": "..."  and  AccountKey=...
    (
        r"(?i)((?:secret|token|passw|credential|signature|connection_?string|access_?key|account_?key|api_?key"
        r"|private_?key)[\w.-]*[\"']?\s*[:=]\s*[\"']?)[^\"',;&}\s]+"
    ),
    # AWS access key ids have a shape of their own, and so has the head of a private key.
    r"()\b(?:AKIA|ASIA)[0-9A-Z]{12,}",
    r"(-----BEGIN )[^\"]*",
)


class TrackingError(ValueError):
    """What the run's environment says, or what was asked of it, cannot be used.

    The message says what was received (shortened, secrets masked), what was expected, and what to do.
    """


def mask_secrets(text: str) -> str:
    """Replace what may be a secret in `text` (a URL's user info and query, values of keys such as ``token``).

    Examples:
        >>> mask_secrets("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtn@bucket/run")
        's3://***@bucket/run'
        >>> mask_secrets("https://host/data?sig=abc")
        'https://host/data?***'
    """
    import re  # here and not above: 5 ms that only an error message needs

    for pattern in _SECRETS:
        text = re.sub(pattern, lambda match: f"{match[1]}***" + ("@" if match[0].endswith("@") else ""), text)
    return text


def shown(value: str) -> str:
    """`value` as an error message may quote it: masked, then shortened, then escaped."""
    # The end that is added closes what the cut left open: user info counts as such up to its "@".
    masked = mask_secrets(value if len(value) <= _MASKED_CHARACTERS else value[:_MASKED_CHARACTERS] + "@")
    if len(masked) > _SHOWN_CHARACTERS or len(value) > _MASKED_CHARACTERS:
        return f"{masked[:_SHOWN_CHARACTERS]!a}... ({len(value):,} characters)"
    return ascii(masked)


def closest(name: str, names: list[str]) -> str:
    """``" Did you mean 'digits'?"``, or nothing where no name is near."""
    import difflib  # here and not above: 3 ms that only an error message needs

    near = difflib.get_close_matches(name, names, n=1)
    if not near:  # a difference in case alone counts as near
        near = [known for known in names if known.lower() == name.lower()]
    return f" Did you mean {shown(near[0])}?" if near else ""
