"""TLS of the server's port: new connections get the certificate that is in the files by then; old ones go on."""

import grpc

from patchclamp_server.security.tls_files import TlsMaterial
from patchclamp_server.security.watched_file import WatchedFile


def server_credentials(tls: WatchedFile[TlsMaterial]) -> grpc.ServerCredentials:
    """Returns credentials, for mTLS where there is a client CA: whoever has no certificate of it gets no connection."""
    served = tls.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Answers gRPC before every handshake, on a thread of its own; None changes nothing."""
        nonlocal served
        if tls.value is served:
            return None
        served = tls.value
        return _configuration(served)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served),
        changed,  # type: ignore[arg-type]  # the stubs do not know that it may return None
        require_client_authentication=served.client_ca is not None,
    )


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=material.client_ca)
