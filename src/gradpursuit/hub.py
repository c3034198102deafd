"""Whether the hub can be reached at all."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request


def hub_can_be_asked() -> bool:
    """Whether the hub's name can be resolved, or a proxy may do it; asking in vain takes the hub's client a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlparse(constants.ENDPOINT)
    try:
        socket.getaddrinfo(url.hostname, url.port or 443)
    except OSError:
        return False
    return True
