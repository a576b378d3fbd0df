"""The side that faces the client: the server, the translated route, the proxy's own routes."""
