#!/usr/bin/env bash
# Builds the pinned tools of the deployment tests, each once, into a folder
# outside the repository:
#
#   bash tests/deploy/tools.sh helm clients    what every test run takes: helm, grpcurl, ghz
#   bash tests/deploy/tools.sh cluster         what tests/deploy/cluster.sh takes
#   bash tests/deploy/tools.sh --have cluster  builds nothing; is everything there?
#
# Tools go to $CERTIQ_TOOLS, or ${XDG_CACHE_HOME:-$HOME/.cache}/certiq-tools, as
# NAME-VERSION/; the folder's name is the last line printed. A tool that is
# there is not built again, two runs at once do not disturb each other, and one
# that is broken off leaves nothing that looks finished.
#
# Exit status: 0; 1 a build failed; 2 usage; 3 something is missing (with
# --have), or it takes a Go that is not here.
set -euo pipefail

helm_version=v4.3.1
kubernetes_version=v1.36.3
etcd_version=v3.6.8
kwok_version=v0.8.0
prometheus_operator_version=v0.85.0
grpcurl_version=v1.9.4
ghz_version=v0.93.0
# What the newest of them asks for in its go.mod.
go_wanted=1.26

tools="${CERTIQ_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/certiq-tools}"

# Where NAME is or would be.
folder_of() {
  case "$1" in
    helm) echo "$tools/helm-$helm_version" ;;
    etcd) echo "$tools/etcd-$etcd_version" ;;
    kwok) echo "$tools/kwok-$kwok_version" ;;
    crds) echo "$tools/crds-$prometheus_operator_version" ;;
    grpcurl) echo "$tools/grpcurl-$grpcurl_version" ;;
    ghz) echo "$tools/ghz-$ghz_version" ;;
    kubernetes) echo "$tools/kubernetes-$kubernetes_version" ;;
    *) return 2 ;;
  esac
}

have() { [[ -d "$(folder_of "$1")" ]]; }

# The folder of a module's source, downloaded and checked against the checksum database.
module() {
  go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p'
}

# Each build_NAME fills the folder $1, with the scratch folder $2 to work in.

build_helm() {
  GOBIN="$1" go install "helm.sh/helm/v4/cmd/helm@$helm_version"
}

build_grpcurl() {
  GOBIN="$1" go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$grpcurl_version"
}

build_ghz() {
  GOBIN="$1" go install "github.com/bojand/ghz/cmd/ghz@$ghz_version"
}

build_kwok() {
  GOBIN="$1" go install -ldflags "-s -w" "sigs.k8s.io/kwok/cmd/kwok@$kwok_version"
  # How its nodes and pods come to be Ready.
  local source
  source="$(module "sigs.k8s.io/kwok@$kwok_version")"
  mkdir "$1/stages"
  cp --no-preserve=mode "$source"/kustomize/stage/{node/fast,node/heartbeat-with-lease,pod/fast}/*-*.yaml \
    "$1/stages/"
}

# Its go.mod has replaces, which "go install" refuses.
build_etcd() {
  cd "$2"
  go mod init scratch
  go get "go.etcd.io/etcd/server/v3@$etcd_version"
  go build -ldflags "-s -w" -o "$1/etcd" go.etcd.io/etcd/server/v3
}

# ServiceMonitor and PrometheusRule as the operator defines them.
build_crds() {
  local source
  source="$(module "github.com/prometheus-operator/prometheus-operator@$prometheus_operator_version")"
  cp --no-preserve=mode \
    "$source"/example/prometheus-operator-crd/monitoring.coreos.com_{servicemonitors,prometheusrules}.yaml "$1/"
}

# Kubernetes' module is meant to be built beside its staging folder, which the
# proxy's copy lacks: the same code comes as k8s.io/* v0.36.3.
build_kubernetes() {
  local source minor="${kubernetes_version#v1.}" package=k8s.io/component-base/version
  source="$(module "k8s.io/kubernetes@$kubernetes_version")"
  cp -r --no-preserve=mode "$source" "$2/kubernetes"
  cd "$2/kubernetes"
  rm -rf go.work go.work.sum vendor staging
  sed -i -e '/=> \.\/staging\//d' -e "s|^\(\s*k8s.io/[a-z0-9-]*\) v0.0.0$|\1 v0.$minor|" go.mod
  # -mod=mod writes the sums of k8s.io/* into go.sum, after asking the checksum database.
  go build -mod=mod -o "$1/" -ldflags "-s -w
    -X $package.gitVersion=$kubernetes_version
    -X $package.gitMajor=1 -X $package.gitMinor=${minor%%.*}" \
    ./cmd/kubectl ./cmd/kube-scheduler ./cmd/kube-controller-manager ./cmd/kube-apiserver
}

# A Go that can build them.
suitable_go() {
  local version
  version="$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null)" || return 1
  version="${version#go}"
  [[ "$(printf '%s\n' "$go_wanted" "$version" | sort -V | head -n 1)" == "$go_wanted" ]]
}

build() {
  local name="$1" folder work
  folder="$(folder_of "$name")"
  work="$(mktemp -d "$tools/.$name.XXXXXX")"
  # Expanded now: work is local.
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  mkdir "$work/result" "$work/scratch"
  echo "tools: building $(basename "$folder")" >&2
  SECONDS=0
  (set -e; "build_$name" "$work/result" "$work/scratch") >&2
  # One version of each is enough, and whoever looks for it finds no other.
  find "$tools" -maxdepth 1 -name "$name-*" -exec rm -rf {} +
  mv "$work/result" "$folder"
  rm -rf "$work"
  trap - EXIT
  echo "tools: $(basename "$folder") took $SECONDS s" >&2
}

only_look=false
if [[ "${1:-}" == --have ]]; then
  only_look=true
  shift
fi
wanted=()
for argument in "$@"; do
  if [[ "$argument" == cluster ]]; then
    wanted+=(helm crds etcd kubernetes kwok)
  elif [[ "$argument" == clients ]]; then
    wanted+=(grpcurl ghz)
  elif folder_of "$argument" >/dev/null; then
    wanted+=("$argument")
  else
    echo "tools: no tool '$argument'" >&2
    exit 2
  fi
done
if [[ ${#wanted[@]} -eq 0 ]]; then
  echo "usage: tools.sh [--have] NAME..." >&2
  exit 2
fi

missing=()
for name in "${wanted[@]}"; do
  have "$name" || missing+=("$name")
done
if [[ ${#missing[@]} -gt 0 ]]; then
  if "$only_look"; then
    echo "tools: not in $tools: ${missing[*]}; bash tests/deploy/tools.sh $* builds them" >&2
    exit 3
  fi
  if ! suitable_go; then
    echo "tools: ${missing[*]}: building takes Go $go_wanted or newer; here is" \
      "$(go version 2>/dev/null || echo none)" >&2
    exit 3
  fi
  export CGO_ENABLED=0 GOWORK=off GOTOOLCHAIN=local
  export GOFLAGS="-buildvcs=false -p=${CERTIQ_TOOLS_JOBS:-$(nproc)}"
  mkdir -p "$tools"
  exec 9>"$tools/.lock"
  flock 9
  for name in "${missing[@]}"; do
    have "$name" || build "$name"
  done
fi
echo "$tools"
