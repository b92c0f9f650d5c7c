"""Mask passwords, keys and tokens in logs, error messages and output."""

__all__: list[str] = []

# A quoted value is cut to this length: enough to recognise the value, too little to fill a log.
_SHOWN_CHARACTERS = 200

# Only this many characters are searched for secrets, because a variable may hold 100 kB.
_MASKED_CHARACTERS = 4_000

# The scheme and user info of a URL, up to its last "@", because a secret key may contain "/", "@" or a quote.
# One slash is a mistake, which must not show the secret either.
_USER_INFO = r"(\w*)(:(?:\\?/){1,2})(\S*)@"

# The text before the "@" in wasbs://container@account is not a secret, unless it contains a password.
_AZURE_SCHEMES = ("wasb", "wasbs", "abfs", "abfss")

# The query of a URL, because it holds the signature of a signed URL.
_QUERY = r"(:(?:\\?/){1,2}[^\s\"'?]*\?)[^\s\"']+"

# A secret may follow any of these words, in any form, so nothing after the first of them is shown.
_WORDS = (
    r"(?i:secret|token|passw|credential|signature|\bsig\b|bearer|authorization|connection_?string"
    r"|(?:access|account|api|private|shared)_?key|-----BEGIN)|AKIA|ASIA"
)


def mask_secrets(text: str) -> str:
    """Mask possible secrets in `text`: a URL's user info and query, and everything after a word such as ``token``.

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
    import re  # here and not above: it takes 5 ms, and only error messages need it

    text = mask_urls(text)
    word = re.search(_WORDS, text)
    if word is None or re.fullmatch(r"s?[\s.,;!?)]*", text[word.end() :]):
        return text
    return f"{text[: word.end()]}***"


def mask_urls(text: str) -> str:
    """Mask only the user info and the query of every URL in `text`: for a text that is known to be a path.

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

    if re.match(r"[\w.+:-]+:/", text):  # the whole text is one URL, so white space and quotes do not end it
        text = re.sub(r"(?s)(\w*)(://?)(.*)@", user_info, text)
        return re.sub(r"(?s)\?.+", "?***", text)
    text = re.sub(_USER_INFO, user_info, text)
    return re.sub(_QUERY, r"\1***", text)


def shown_value(value: str) -> str:
    """Return `value` for quoting in an error message: masked, then shortened, then escaped."""
    return _quoted(mask_secrets(_head(value)), value)


def shown_path(path: str) -> str:
    """Return a path, URL or name for quoting in an error message.

    It is masked as by `mask_urls`, so that ``/data/tokens`` is shown, then shortened and escaped as by `shown_value`.
    """
    return _quoted(mask_urls(_head(path)), path)


def _head(value: str) -> str:
    # The cut may remove the "@" that ends user info, so an "@" is added: without it, user info would not be masked.
    return value if len(value) <= _MASKED_CHARACTERS else value[:_MASKED_CHARACTERS] + "@"


def _quoted(masked: str, value: str) -> str:
    if len(masked) > _SHOWN_CHARACTERS or len(value) > _MASKED_CHARACTERS:
        return f"{masked[:_SHOWN_CHARACTERS]!a}... ({len(value):,} characters)"
    return ascii(masked)
