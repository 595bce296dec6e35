"""A small stand-in for the W&B server: enough of it for a run to begin, be logged and end, and for artifacts to be sent."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """`rows` are the history rows received, `files` the bodies of uploads by path, `operations` the GraphQL calls; it answers
    after `delay` seconds, None for never."""

    def __init__(self, delay: float | None = 0.0) -> None:
        self.rows: list[dict] = []
        self.operations: list[tuple[str, dict]] = []
        self.uploads: list[str] = []
        self.released = threading.Event()
        self.delay = delay
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # clients go without a word
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def called(self, name: str) -> list[dict]:
        """Returns the variables of every GraphQL call of that name."""
        return [variables for operation, variables in self.operations if operation == name]

    def answer(self, query: str, variables: dict) -> dict:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        self.operations.append((name, variables))
        if name == "UpsertBucket":
            project = {"name": "autoprune", "entity": {"name": "tester"}}
            bucket = {"id": "1", "name": variables.get("name") or "run", "displayName": "run", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket | {"sweepName": "", "project": project}, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": each, "uploadUrl": f"{self.url}/upload/{each}"} for each in variables.get("files", [])]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":  # as if its content were known already, so that none is sent
            known = {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": known}}
        if name == "ArtifactType":
            return {"project": None}
        if name == "Viewer":
            return {"viewer": {"id": "1", "entity": "tester", "username": "tester", "teams": {"edges": []}, "flags": "{}"}}
        return {}


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if server.delay is None:
                server.released.wait()
                return
            time.sleep(server.delay)
            if self.path.endswith("/graphql"):
                request = json.loads(body)
                self._reply({"data": server.answer(request["query"], request.get("variables") or {})})
                return
            if self.path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                server.rows += map(json.loads, lines)
            self._reply({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.uploads.append(self.path)
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def _reply(self, document: dict) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
