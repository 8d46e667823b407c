#!/bin/sh
# Regenerates the committed Python code of every .proto here. Run from anywhere; used by `make proto`.
# The mapping -Ilongreach=. makes generated files import longreach.cluster.proto.x_pb2; since the
# virtual path is longreach/..., protoc writes there, so the files are moved back beside the .proto.
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -Ilongreach=. \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  longreach/cluster/proto/inference.proto longreach/cluster/proto/jobs.proto \
  longreach/cluster/proto/contexts.proto longreach/cluster/proto/admin.proto \
  longreach/cluster/proto/kv.proto
cp "$out"/longreach/cluster/proto/*_pb2*.py "$out"/longreach/cluster/proto/*_pb2.pyi cluster/proto/
