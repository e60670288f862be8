#!/bin/sh
# Installs Stasis into a development cluster the way a user does:
#   hack/install.sh [STATE]
# Images are loaded into the nodes instead of pulled from a registry; the rest is
# "kubectl apply -k config/install" and waiting.
set -eu
cd "$(dirname "$0")/.."
state=${1:-.devcluster}

for image in stasis-agent stasis-controller; do
	bin/devcluster --state "$state" load "dist/images/$image.tar"
done
kubectl() { bin/kubectl --kubeconfig "$state/kubeconfig" "$@"; }
kubectl apply -k config/install
kubectl -n stasis-system rollout status deployment/stasis-controller --timeout=180s
kubectl -n stasis-system rollout status daemonset/stasis-agent --timeout=180s
