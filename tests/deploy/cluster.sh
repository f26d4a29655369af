#!/usr/bin/env bash
# The chart in a real control plane: etcd, Kubernetes' API server, controllers and
# scheduler on the loopback, and two nodes that kwok plays, whose pods become
# Ready without a container being run.
#
#   bash tests/deploy/cluster.sh           builds what is missing (tools.sh), then runs
#   bash tests/deploy/cluster.sh --have    runs only with what was built before
#
# Installs, upgrades, rolls back, evicts against the disruption budget, scales by
# the autoscaler, and offers the API server what it must refuse. Prints a line for
# each step. Takes a minute or two, leaves nothing running and nothing behind.
# CERTIQ_CLUSTER_LOGS names a folder for the logs.
#
# Exit status: 0; 1 a step failed; 3 something is missing and cannot be built here.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
chart="$here/../../deploy/helm/certiq"
tools="$(bash "$here/tools.sh" "$@" cluster | tail -n 1)" || exit $?
node_count=2
patience=180

bin() { echo "$tools"/*/"$1"; }
helm="$(bin helm)"
kubectl="$(bin kubectl)"

work="$(mktemp -d)"
# What helm and kubectl remember goes too.
export HOME="$work"
unset KUBECONFIG "${!HELM_@}"
logs="${CERTIQ_CLUSTER_LOGS:-$work/logs}"
mkdir -p "$logs"
pids=()

clean_up() {
  local status=$? pid
  trap - EXIT INT TERM HUP
  # Clients first, the API server and etcd last.
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid="${pids[i]}"
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "cluster: FAILED $*" >&2
  for log in "$logs"/*; do
    echo "--- $(basename "$log")" >&2
    tail -n 8 "$log" | cut -c 1-400 >&2
  done
  k get pods,deployments,statefulsets,hpa,pdb,events --all-namespaces >&2 || true
  exit 1
}

k() { "$kubectl" --kubeconfig "$work/kubeconfig" "$@"; }
h() { "$helm" --kubeconfig "$work/kubeconfig" --namespace certiq "$@"; }

# until_true WHAT COMMAND...
until_true() {
  local what="$1" end=$((SECONDS + patience))
  shift
  until "$@" >/dev/null 2>&1; do
    if [[ $SECONDS -ge $end ]]; then
      fail "waited $patience s: $what"
    fi
    sleep 0.2
  done
}

steps=0
step_begin=0
step() {
  steps=$((steps + 1))
  echo "ok  $(printf '%3d' $((SECONDS - step_begin))) s  $*"
  step_begin=$SECONDS
}

# start NAME PROGRAM ARGUMENTS...
start() {
  local name="$1"
  shift
  "$@" >"$logs/$name.log" 2>&1 9>&- &
  pids+=($!)
}

# --- the control plane

mapfile -t ports < <(python3 - <<'PYTHON'
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in held), sep="\n")
PYTHON
)
etcd_url="http://127.0.0.1:${ports[0]}"
api_url="https://127.0.0.1:${ports[2]}"

start etcd "$(bin etcd)" --data-dir "$work/etcd" --unsafe-no-fsync --log-level warn \
  --listen-client-urls "$etcd_url" --advertise-client-urls "$etcd_url" \
  --listen-peer-urls "http://127.0.0.1:${ports[1]}" \
  --initial-advertise-peer-urls "http://127.0.0.1:${ports[1]}" \
  --initial-cluster "default=http://127.0.0.1:${ports[1]}"

openssl genrsa -out "$work/accounts.key" 2048 2>/dev/null
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost \
  -keyout "$work/metrics.key" -out "$work/metrics.crt" 2>/dev/null
token="$(openssl rand -hex 16)"
echo "$token,admin,admin,system:masters" >"$work/tokens"
cat >"$work/kubeconfig" <<YAML
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, user: admin}}]
clusters: [{name: here, cluster: {server: "$api_url", certificate-authority: "$work/api/apiserver.crt"}}]
users: [{name: admin, user: {token: "$token"}}]
YAML

start apiserver "$(bin kube-apiserver)" --etcd-servers "$etcd_url" \
  --bind-address 127.0.0.1 --secure-port "${ports[2]}" --cert-dir "$work/api" \
  --token-auth-file "$work/tokens" --authorization-mode RBAC \
  --service-account-key-file "$work/accounts.key" \
  --service-account-signing-key-file "$work/accounts.key" \
  --service-account-issuer https://kubernetes.default.svc \
  --service-cluster-ip-range 10.96.0.0/16 --endpoint-reconciler-type none
until_true "the API server is ready" k get --raw /readyz
start controllers "$(bin kube-controller-manager)" --kubeconfig "$work/kubeconfig" \
  --leader-elect=false --secure-port 0 --service-account-private-key-file "$work/accounts.key" \
  --root-ca-file "$work/api/apiserver.crt" \
  --horizontal-pod-autoscaler-sync-period 2s --horizontal-pod-autoscaler-cpu-initialization-period 0s \
  --horizontal-pod-autoscaler-initial-readiness-delay 0s
start scheduler "$(bin kube-scheduler)" --kubeconfig "$work/kubeconfig" --leader-elect=false \
  --secure-port 0
stages=()
for stage in "$tools"/kwok-*/stages/*.yaml; do
  stages+=(--config "$stage")
done
start kwok "$(bin kwok)" --kubeconfig "$work/kubeconfig" --manage-all-nodes=true \
  --node-lease-duration-seconds 40 --cidr 10.1.0.0/16 --node-ip 127.0.0.1 "${stages[@]}"

for n in $(seq "$node_count"); do
  k create -f - >/dev/null <<YAML
apiVersion: v1
kind: Node
metadata: {name: node-$n, labels: {kubernetes.io/hostname: node-$n, kubernetes.io/os: linux}}
status:
  allocatable: {cpu: "32", memory: 128Gi, pods: "110"}
  capacity: {cpu: "32", memory: 128Gi, pods: "110"}
---
# What a storage driver would make: here it is waiting.
apiVersion: v1
kind: PersistentVolume
metadata: {name: volume-$n}
spec:
  capacity: {storage: 50Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: block
  hostPath: {path: /nowhere/$n}
YAML
done
k wait --for=condition=Ready nodes --all --timeout "${patience}s" >/dev/null
k create -f - >/dev/null <<YAML
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: block}
provisioner: kubernetes.io/no-provisioner
allowVolumeExpansion: true
YAML
k create namespace certiq >/dev/null
k label namespace certiq pod-security.kubernetes.io/enforce=restricted >/dev/null
k apply --server-side -f "$(echo "$tools"/crds-*)" >/dev/null
k wait --for=condition=Established crd --all --timeout "${patience}s" >/dev/null
until_true "the namespace has its service account" k -n certiq get serviceaccount default
step "control plane: Kubernetes $(k version -o json | python3 -c \
  'import json, sys; print(json.load(sys.stdin)["serverVersion"]["gitVersion"])'), $node_count nodes, pod security \"restricted\" enforced"

# --- metrics for the autoscaler

set_readings() {
  printf '{"cpu_millicores": %d, "custom": {"certiq_queue_depth": %d}}\n' "$1" "$2" >"$work/readings.tmp"
  mv "$work/readings.tmp" "$work/readings"
}
set_readings 1000 0
start metrics python3 "$here/metrics_api.py" "$work/metrics.crt" "$work/metrics.key" \
  "$work/readings" "$work/metrics.port" "$kubectl" --kubeconfig "$work/kubeconfig"
until_true "the metrics API listens" test -s "$work/metrics.port"
k create -f - >/dev/null <<YAML
apiVersion: v1
kind: Service
metadata: {name: metrics, namespace: kube-system}
spec: {type: ExternalName, externalName: localhost}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {name: metrics, namespace: kube-system, port: $(<"$work/metrics.port")}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta2.custom.metrics.k8s.io}
spec:
  group: custom.metrics.k8s.io
  version: v1beta2
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {name: metrics, namespace: kube-system, port: $(<"$work/metrics.port")}
YAML
k wait --for=condition=Available apiservice/v1beta1.metrics.k8s.io \
  apiservice/v1beta2.custom.metrics.k8s.io --timeout "${patience}s" >/dev/null
step "metrics.k8s.io and custom.metrics.k8s.io, with readings set by this script"

# --- install

cat >"$work/values.yaml" <<'YAML'
allowCleartext: true
image: {repository: registry.example/certiq}
store: {persistence: {storageClass: block}}
metrics: {serviceMonitor: {enabled: true}, prometheusRule: {enabled: true}, dashboard: {enabled: true}}
YAML
install_or_upgrade() {
  h upgrade --install release "$chart" --values "$work/values.yaml" --wait --timeout "${patience}s" "$@" \
    >"$logs/helm.log" 2>&1 || fail "helm upgrade $*: $(<"$logs/helm.log")"
}
# ready KIND NAME COUNT: that many pods, all of the newest template.
ready() {
  k -n certiq rollout status "$1/$2" --timeout "${patience}s" >/dev/null || fail "rollout of $2"
  local count
  count="$(k -n certiq get "$1/$2" -o jsonpath='{.status.readyReplicas}')"
  [[ "$count" == "$3" ]] || fail "$2: expected $3 ready pods, got ${count:-0}"
}
# of_pods JSONPATH: of every pod, one a line.
of_pods() {
  k -n certiq get pods -l "app.kubernetes.io/component=$1" \
    -o jsonpath="{range .items[*]}{$2}{'\n'}{end}"
}
install_or_upgrade
ready statefulset release-certiq-store 1
ready deployment release-certiq-quantize 2
[[ "$(k -n certiq get pvc -o jsonpath='{.items[*].status.phase}')" == Bound ]] || fail "the volume is not bound"
[[ "$(of_pods quantize .spec.nodeName | sort -u | wc -l)" == "$node_count" ]] || fail "Quantize is not spread"
step "helm install --wait: store 1/1 on a bound volume, quantize 2/2 on $node_count nodes"

refused() {
  local what="$1" words="$2"
  shift 2
  if "$@" >"$work/said" 2>&1; then
    fail "$what: was accepted"
  fi
  grep -q -- "$words" "$work/said" || fail "$what: refused, but with $(<"$work/said")"
  step "refused: $what"
}
refused "a second replica of the store" "expected 0 or 1, got 2" \
  h upgrade release "$chart" --values "$work/values.yaml" --set store.replicas=2

# --- upgrade and rollback

# image_is TAG: every pod's.
image_is() {
  local images
  images="$(of_pods store '.spec.containers[0].image'; of_pods quantize '.spec.containers[0].image')"
  [[ "$(sort -u <<<"$images")" == "registry.example/certiq:$1" ]]
}
claim="$(k -n certiq get pvc -o jsonpath='{.items[*].metadata.uid}')"
install_or_upgrade --set image.tag=next --set drain.seconds=60
ready statefulset release-certiq-store 1
ready deployment release-certiq-quantize 2
until_true "every pod has the new image" image_is next
step "helm upgrade --wait to another image: every pod replaced"

h rollback release 1 --wait --timeout "${patience}s" >"$logs/helm.log" 2>&1 || fail "helm rollback"
ready statefulset release-certiq-store 1
ready deployment release-certiq-quantize 2
until_true "every pod has the first image" image_is "$(sed -n 's/^appVersion: //p' "$chart/Chart.yaml")"
[[ "$(k -n certiq get pvc -o jsonpath='{.items[*].metadata.uid}')" == "$claim" ]] ||
  fail "the store's volume was replaced"
step "helm rollback --wait: every pod as before, the store's volume the same all along"

# --- eviction

evict() {
  k create --raw "/api/v1/namespaces/certiq/pods/$1/eviction" -f - <<JSON
{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "$1", "namespace": "certiq"}}
JSON
}
budget_allows() {
  [[ "$(k -n certiq get pdb release-certiq-quantize -o jsonpath='{.status.disruptionsAllowed}')" == "$1" ]]
}
until_true "the budget allows one" budget_allows 1
# Nothing takes the place of an evicted pod while no node takes any.
k cordon node-1 node-2 >/dev/null
mapfile -t pods < <(of_pods quantize .metadata.name)
evict "${pods[0]}" >/dev/null || fail "the first eviction was refused"
until_true "the budget is used up" budget_allows 0
refused "the second eviction, while the first pod is not replaced" "disruption budget" evict "${pods[1]}"
k uncordon node-1 node-2 >/dev/null
ready deployment release-certiq-quantize 2
until_true "the budget allows one again" budget_allows 1
evict "${pods[1]}" >/dev/null || fail "the second eviction was refused although the first pod was replaced"
ready deployment release-certiq-quantize 2
step "evicted once the first was replaced"
k drain node-1 --ignore-daemonsets --timeout "${patience}s" >"$logs/drain.log" 2>&1 || fail "drain"
ready deployment release-certiq-quantize 2
ready statefulset release-certiq-store 1
k uncordon node-1 >/dev/null
step "kubectl drain of a node: both workloads ready on the other"

# --- autoscaling

replicas_are() {
  [[ "$(k -n certiq get deployment release-certiq-quantize -o jsonpath='{.spec.replicas} {.status.readyReplicas}')" == "$1 $1" ]]
}
scaled() {
  until_true "quantize has $1 pods, all ready ($2)" replicas_are "$1"
  step "scaled to $1: $2"
}
# A request of 2 CPUs and a target of 70 %: 1.4 CPUs a pod.
install_or_upgrade --set quantize.autoscaling.enabled=true --set quantize.autoscaling.queueDepth=4 \
  --set quantize.autoscaling.maxReplicas=6 --set quantize.autoscaling.scaleDownStabilizationSeconds=0
until_true "the autoscaler reads both metrics" \
  k -n certiq wait --for=condition=ScalingActive hpa/release-certiq-quantize --timeout 1s
replicas_are 2 || fail "two busy pods at 50 % are enough"
set_readings 1950 0
scaled 6 "CPU at 97 % of the request, up to maxReplicas"
set_readings 100 0
scaled 2 "idle, down to minReplicas"
set_readings 100 8
scaled 6 "idle CPUs, but 8 layers waiting a pod where 4 are meant"
set_readings 100 0
scaled 2 "the queue is empty"
# An upgrade leaves the autoscaler's number alone.
set_readings 1400 0
k -n certiq scale deployment release-certiq-quantize --replicas 3 >/dev/null
scaled 3 "by hand, at exactly the target"
install_or_upgrade --set quantize.autoscaling.enabled=true --set quantize.autoscaling.maxReplicas=6 \
  --set image.tag=next
replicas_are 3 || fail "the upgrade changed what the autoscaler had chosen"
step "helm upgrade keeps the autoscaler's number"

# --- what only a real API server finds

# dry_run WORDS SET...: what the chart renders with it is refused by the API server.
server_refuses() {
  local what="$1" words="$2"
  shift 2
  h template other "$chart" --values "$work/values.yaml" "$@" >"$work/rendered.yaml"
  refused "$what, by the API server" "$words" k -n certiq create --dry-run=server -f "$work/rendered.yaml"
}
server_refuses "a request above the limit" "must be less than or equal to memory limit" \
  --set store.resources.requests.memory=16Gi
for security in tls.secretName=certificate tls.secretName=certificate,tls.clientCASecretName=authority; do
  h template other "$chart" --set "$security" --set tokens.secretName=tokens \
    --set store.podDisruptionBudget.enabled=true --set quantize.autoscaling.enabled=true \
    --set metrics.serviceMonitor.enabled=true --set metrics.prometheusRule.enabled=true >"$work/rendered.yaml"
  k -n certiq create --dry-run=server -f "$work/rendered.yaml" 2>&1 >/dev/null | tee "$work/said" >&2
  # Warnings too: pods that pod security would not let in, fields that are on their way out.
  [[ ! -s "$work/said" ]] || fail "the API server has something to say about $security"
  step "accepted without a warning, in a dry run: $security and everything else"
done

h uninstall release --wait --timeout "${patience}s" >"$logs/helm.log" 2>&1 || fail "helm uninstall"
[[ -n "$(k -n certiq get pvc -o name)" ]] || fail "the store's volume went with the release"
step "helm uninstall --wait: the store's volume stays"

# --- the guide's way, with TLS and tokens (deploy/kubernetes.md)

k -n certiq create secret tls certificate --cert "$work/metrics.crt" --key "$work/metrics.key" >/dev/null
echo "$token reader read" >"$work/tokens"
k -n certiq create secret generic tokens --from-file "$work/tokens" >/dev/null
guide=(--set image.repository=registry.example/certiq --set tls.secretName=certificate
  --set tokens.secretName=tokens)
k -n certiq delete pvc --all --wait >/dev/null
h install release "$chart" "${guide[@]}" --set store.persistence.storageClass=block --wait \
  --timeout "${patience}s" >"$logs/helm.log" 2>&1 || fail "helm install with TLS: $(<"$logs/helm.log")"
ready statefulset release-certiq-store 1
step "helm install --wait with TLS and tokens from secrets"

k -n certiq patch pvc data-release-certiq-store-0 \
  --patch '{"spec": {"resources": {"requests": {"storage": "80Gi"}}}}' >/dev/null || fail "the claim does not grow"
k -n certiq delete statefulset release-certiq-store --cascade=orphan >/dev/null
h upgrade release "$chart" --reuse-values --set store.persistence.size=80Gi --wait --timeout "${patience}s" \
  >"$logs/helm.log" 2>&1 || fail "helm upgrade to a larger volume: $(<"$logs/helm.log")"
ready statefulset release-certiq-store 1
[[ "$(of_pods store '.spec.containers[0].env[?(@.name=="CERTIQ_DISK_BUDGET_BYTES")].value')" == 77309411328 ]] ||
  fail "the disk budget did not grow with the volume"
step "a larger volume: claim patched, StatefulSet made anew around its pod, disk budget moved"

echo "cluster: $steps steps, $SECONDS s"
