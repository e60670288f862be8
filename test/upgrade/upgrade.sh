#!/bin/sh
# Upgrades a cluster of two nodes from an earlier revision of Stasis to this one, in steps
# between which some of it is of one and some of the other, and does the main job at each:
# of a Pod a checkpoint, and of that a Pod that goes on, on its node and on the other. What
# was checkpointed before is restored after, and the other way round.
#
#   test/upgrade/upgrade.sh REVISION
#
# REVISION is anything that git knows. Its programs are built in a work tree of their own.
set -eu
cd "$(dirname "$0")/../.."

[ $# = 1 ] || { echo "usage: $0 REVISION" >&2; exit 1; }
revision=$(git rev-parse --short "$1^{commit}") || { echo "upgrade: git knows no revision $1" >&2; exit 1; }
root=$PWD
state=.devcluster-upgrade
from=$root/dist/upgrade/$revision

export KUBECONFIG="$root/$state/kubeconfig" PATH="$root/bin:$PATH"
say() { echo "upgrade: $*"; }
fail() {
	echo "upgrade: $*" >&2
	kubectl get pods,podcheckpoints -A -o wide >&2 || true
	kubectl get events --sort-by=.lastTimestamp 2>/dev/null | tail -n 20 >&2 || true
	exit 1
}
cleanup() {
	code=$?
	trap - EXIT
	bin/devcluster --state "$state" down >/dev/null 2>&1 || code=1
	git worktree remove --force "$from" >/dev/null 2>&1 || true
	exit "$code"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

say "build revision $revision"
git worktree prune
[ -d "$from" ] || git worktree add --quiet --detach "$from" "$revision"
make -C "$from" images IMAGE_TAG=before >dist/upgrade/build.log 2>&1 || fail "revision $revision cannot be built: dist/upgrade/build.log"

# manifests TREE TAG KIND: a tree's manifests of a kind, or, of -KIND, all but those. Agents
# are replaced when they end.
manifests() {
	kubectl kustomize "$1/config/install" | sed -e "s/\(image: localhost\/stasis-[a-z]*\):dev/\1:$2/" \
		-e '/^  updateStrategy:/,/maxUnavailable:/c\  updateStrategy: {type: OnDelete}' | awk -v wanted="$3" '
		function flush() { if (text != "" && (wanted == kind || wanted ~ /^-/ && wanted != "-" kind)) printf "---\n%s", text; text = "" }
		/^---$/ { flush(); next }
		/^kind: / { kind = $2 }
		{ text = text $0 "\n" }
		END { flush() }'
}
controllers() { kubectl -n stasis-system rollout status deployment/stasis-controller --timeout=180s >/dev/null; }
# agents NODE... has those of nodes started anew.
agents() {
	for node; do
		kubectl -n stasis-system delete pod -l app.kubernetes.io/component=agent --field-selector "spec.nodeName=$node" --wait >/dev/null
	done
	sleep 1 # until there are new ones to wait for
	kubectl -n stasis-system wait pod -l app.kubernetes.io/component=agent --for=condition=Ready --timeout=180s >/dev/null
	# Of which version nodes restore is said by their labels, which follow.
	sleep 2
}

# begin NAME NODE: a Pod that counts.
begin() {
	sed "s/^  name: counters/  name: $1/; s/^spec:/spec:\n  nodeName: $2/" demo/pod.yaml | kubectl apply -f - >/dev/null
	kubectl wait pod "$1" --for=condition=Ready --timeout=90s >/dev/null || fail "Pod $1 does not come up"
	sleep 1
}
# last POD nonce|count: of program a, from its last line.
last() { kubectl logs "$1" -c a --tail=1 | sed -n "s/.* $2=\([^ ]*\) .*/\1/p"; }

checkpoint() { # POD NAME
	kubectl checkpoint "$1" --name "$2" >dist/upgrade/said 2>&1 || { cat dist/upgrade/said >&2; fail "checkpoint $2 was not taken"; }
	last "$1" nonce >"dist/upgrade/$2.nonce"
}
restore() { # CHECKPOINT POD NODE
	kubectl restore "$1" --as "$2" --node "$3" >dist/upgrade/said 2>&1 || { cat dist/upgrade/said >&2; fail "Pod $2 was not restored from $1 on $3"; }
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		first=$(last "$2" count)
		[ -z "$first" ] || break
		sleep 1
	done
	[ "$(last "$2" nonce)" = "$(cat "dist/upgrade/$1.nonce")" ] || fail "Pod $2 is not what $1 was taken of: it was started anew"
	sleep 1
	[ "$(last "$2" count)" -gt "$first" ] || fail "Pod $2 does not go on"
	kubectl delete pod "$2" --wait >/dev/null
}
# job NAME: the main job, from each node to itself and to the other.
job() {
	for node in node-1 node-2; do
		other=$([ $node = node-1 ] && echo node-2 || echo node-1)
		begin "$1-$node" $node
		checkpoint "$1-$node" "$1-$node"
		restore "$1-$node" "$1-$node-here" $node
		restore "$1-$node" "$1-$node-there" $other
		kubectl delete pod "$1-$node" --wait >/dev/null
	done
	say "ok: $2"
}

say "bring up a cluster with revision $revision"
bin/devcluster --state "$state" up --nodes 2 >dist/upgrade/up.log 2>&1 || fail "the cluster does not come up: dist/upgrade/up.log"
for tar in "$from/dist/images/stasis-agent.tar" "$from/dist/images/stasis-controller.tar" dist/images/stasis-agent.tar dist/images/stasis-controller.tar dist/images/stasis-demo.tar; do
	bin/devcluster --state "$state" load "$tar" >/dev/null
done
manifests "$from" before -Nothing | kubectl apply -f - >/dev/null
controllers
agents
job before "all of revision $revision"

manifests . dev -DaemonSet | kubectl apply -f - >/dev/null
controllers
job controller "this controller, agents of $revision"

manifests . dev DaemonSet | kubectl apply -f - >/dev/null
agents node-1
job one-agent "this controller, this agent on one node, that of $revision on the other"

agents node-2
for at in before controller one-agent; do
	for node in node-1 node-2; do
		restore "$at-$node" "later-$at-$node" $node
	done
done
say "ok: checkpoints of each step are restored by these agents"
job all "all of this tree"

manifests "$from" before Deployment | kubectl apply -f - >/dev/null
controllers
job back "the controller of $revision again, these agents"
say "ok: from revision $revision to this tree and back with the controller"
