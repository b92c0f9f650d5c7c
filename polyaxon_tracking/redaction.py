"""Mask passwords, keys and tokens in what is logged, raised or shown."""

__all__: list[str] = []

# A quoted value is cut here: enough to recognise it, too little to fill a log.
_SHOWN_CHARACTERS = 200

# Masking looks no further than this, since a variable may hold 100 kB.
_MASKED_CHARACTERS = 4_000

# Scheme and user info of a URL, up to its last "@": a secret key may itself hold "/", "@" or a quote.
_USER_INFO = r"(\w*)(:(?:\\?/){2})(\S*)@"

# What stands before the "@" in wasbs://container@account is no secret, unless it has a password.
_AZURE_SCHEMES = ("wasb", "wasbs", "abfs", "abfss")

# Query of a URL: signed URLs carry their signature there.
_QUERY = r"(:(?:\\?/){2}[^\s\"'?]*\?)[^\s\"']+"

# After any of these words a secret may follow, in whatever form: nothing after the first is shown.
_WORDS = (
    r"(?i:secret|token|passw|credential|signature|\bsig\b|bearer|authorization|connection_?string"
    r"|(?:access|account|api|private|shared)_?key|-----BEGIN)|AKIA|ASIA"
)


def mask_secrets(text: str) -> str:
    """Replace what may be a secret in `text`: a URL's user info and query, and all after a word such as ``token``.

    Examples:
        >>> mask_secrets("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtn@bucket/run")
        's3://***@bucket/run'
        >>> mask_secrets("https://host/data?sig=abc")
        'https://host/data?***'
        >>> mask_secrets('{"a": 1, "secret_key": "abc", "b": 2}')
        '{"a": 1, "secret***'
        >>> mask_secrets("Unable to locate credentials")
        'Unable to locate credentials'
    """
    import re  # here and not above: 5 ms that only an error message needs

    text = mask_urls(text)
    word = re.search(_WORDS, text)
    if word is None or re.fullmatch(r"s?[\s.,;!?)]*", text[word.end() :]):
        return text
    return f"{text[: word.end()]}***"


def mask_urls(text: str) -> str:
    """Replace the user info and the query of every URL in `text`, and nothing else: for what is known to be a path.

    Examples:
        >>> mask_urls("s3://key:secret@bucket/tokens")
        's3://***@bucket/tokens'
    """
    import re  # as in `mask_secrets`

    def user_info(match: re.Match[str]) -> str:
        scheme, slashes, user = match.groups()
        if scheme in _AZURE_SCHEMES and ":" not in user:
            return match[0]
        return f"{scheme}{slashes}***@"

    if re.match(r"[\w.+:-]+://", text):  # white space and quotes end nothing in it
        text = re.sub(r"(?s)(\w*)(://)(.*)@", user_info, text)
        return re.sub(r"(?s)\?.+", "?***", text)
    text = re.sub(_USER_INFO, user_info, text)
    return re.sub(_QUERY, r"\1***", text)


def shown(value: str) -> str:
    """`value` as an error message may quote it: masked, then shortened, then escaped."""
    return _quoted(mask_secrets(_head(value)), value)


def shown_path(path: str) -> str:
    """The same for what is known to be a path, a URL or a name: ``/data/tokens`` is shown as it is."""
    return _quoted(mask_urls(_head(path)), path)


def _head(value: str) -> str:
    # The end that is added closes what the cut left open: user info counts as such up to its "@".
    return value if len(value) <= _MASKED_CHARACTERS else value[:_MASKED_CHARACTERS] + "@"


def _quoted(masked: str, value: str) -> str:
    if len(masked) > _SHOWN_CHARACTERS or len(value) > _MASKED_CHARACTERS:
        return f"{masked[:_SHOWN_CHARACTERS]!a}... ({len(value):,} characters)"
    return ascii(masked)
