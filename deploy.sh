#!/usr/bin/env bash
# Deploys to Fly.io: app, secrets check, image, one machine a region, and a look at each region's /health.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

CONFIG=fly.toml
APP=$(sed -n 's/^app = "\(.*\)"/\1/p' "$CONFIG")
ORG=${FLY_ORG:-personal}
REGIONS=iad,ams,sin
DRY_RUN=false
# A new machine boots in seconds; DNS and certificate of a new app may take minutes.
HEALTH_ATTEMPTS=${HEALTH_ATTEMPTS:-40}
HEALTH_PAUSE=${HEALTH_PAUSE:-5}    # s

usage() {
    cat <<TXT
usage: ./deploy.sh [--app NAME] [--org NAME] [--regions LIST] [--dry-run] [--help]

  --app NAME      Fly app; created if missing (default: $APP)
  --org NAME      organization of an app that has to be created (default: FLY_ORG, else personal)
  --regions LIST  Fly regions, each with at least one machine afterwards (default: $REGIONS)
  --dry-run       print what would run; nothing is run, contacted or changed

environment: HEALTH_URL       base URL for the last check (default: https://NAME.fly.dev)
             HEALTH_ATTEMPTS  tries a region (default: 40), HEALTH_PAUSE s apart (default: 5)

exit: 0 deployed and healthy; 1 a flyctl command failed; 2 wrong usage; 3 flyctl or curl missing, or not
logged in; 4 no provider configured; 5 a region does not answer
TXT
}

fail() {    # exit code, message
    printf 'deploy.sh: %s\n' "$2" >&2
    exit "$1"
}

step() { printf '== %s\n' "$*"; }

exec 3>&1
show() {    # on the real stdout, also where the caller captures the command's own
    local line
    printf -v line ' %q' "$@"
    printf '+%s\n' "$line" >&3
}

run() {    # a command that changes something
    show "$@"
    if ! $DRY_RUN; then
        "$@" </dev/null || fail 1 "failed: $*"
    fi
}

ask() {    # a command whose answer is wanted; the caller captures stdout
    show "$@"
    if ! $DRY_RUN; then
        "$@" </dev/null
    fi
}

while (($#)); do
    case $1 in
        --app | --org | --regions)
            [[ -n ${2:-} ]] || fail 2 "$1 needs a value; see --help"
            case $1 in
                --app) APP=$2 ;;
                --org) ORG=$2 ;;
                --regions) REGIONS=$2 ;;
            esac
            shift 2
            ;;
        --dry-run) DRY_RUN=true; shift ;;
        -h | --help) usage; exit 0 ;;
        *) fail 2 "unknown option: $1; see --help" ;;
    esac
done
[[ $APP =~ ^[a-z0-9-]+$ ]] || fail 2 "--app: must be lower-case letters, digits and dashes, got '$APP'"
[[ $REGIONS =~ ^[a-z]{3}(,[a-z]{3})*$ ]] || fail 2 "--regions: must be like iad,ams,sin, got '$REGIONS'"
IFS=, read -ra REGION_LIST <<<"$REGIONS"
HEALTH_URL=${HEALTH_URL:-https://$APP.fly.dev}

# --- tools and login
FLYCTL=$(command -v flyctl || command -v fly || true)
if $DRY_RUN; then
    FLYCTL=flyctl
    echo 'dry run: these commands would run, in this order'
else
    [[ -n $FLYCTL ]] || fail 3 'flyctl is not on the PATH; https://fly.io/docs/flyctl/install/ says how to get it'
    FLYCTL=$(basename "$FLYCTL")
    command -v curl >/dev/null || fail 3 'curl is not on the PATH'
fi
step 'login'
ask "$FLYCTL" auth whoami || fail 3 "not logged in; run: $FLYCTL auth login"

# --- app
step "app $APP"
apps=$(ask "$FLYCTL" apps list --json) || fail 1 "cannot list the apps of this account"
# flyctl has spelt its JSON keys Name and name.
if ! grep -qE "\"[Nn]ame\": *\"$APP\"" <<<"$apps"; then
    ! $DRY_RUN || echo 'only if the app is missing:'
    run "$FLYCTL" apps create "$APP" --org "$ORG"
fi

# --- secrets: by name, their values cannot be read back
step 'secrets'
secrets=$(ask "$FLYCTL" secrets list --app "$APP" --json) || fail 1 "cannot list the secrets of $APP"

configured() {    # as a secret, or in [env] of fly.toml
    grep -qE "\"[Nn]ame\": *\"$1\"" <<<"$secrets" || grep -qE "^ *$1 *= *\"." "$CONFIG"
}

provider() {    # family, then every variable that it needs
    local family=$1 name missing=()
    shift
    for name in "$@"; do
        configured "$name" || missing+=("$name")
    done
    if ((${#missing[@]} == 0)); then
        PROVIDERS+=("$family")
    else
        printf '%s: not configured, missing %s\n' "$family" "${missing[*]}"
    fi
}

if ! $DRY_RUN; then
    PROVIDERS=()
    provider golem GOLEM_PROVIDER_ENDPOINTS
    provider modal MODAL_API_BASE
    provider runpod RUNPOD_API_KEY RUNPOD_ENDPOINT_ID
    if ((${#PROVIDERS[@]} == 0)); then
        cat >&2 <<TXT
No provider is configured, so the router would have no backend. Set at least one, then run this again:
  $FLYCTL secrets set --app $APP GOLEM_PROVIDER_ENDPOINTS=https://one.example,https://two.example
  $FLYCTL secrets set --app $APP MODAL_API_BASE=https://you--app.modal.run MODAL_API_TOKEN=...
  $FLYCTL secrets set --app $APP RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
TXT
        fail 4 'no provider is configured'
    fi
    echo "configured: ${PROVIDERS[*]}"
    if [[ " ${PROVIDERS[*]} " == *' modal '* ]] && ! configured MODAL_API_TOKEN; then
        echo 'modal: without MODAL_API_TOKEN only endpoints that are open to everyone answer'
    fi
fi

# --- image; --ha=false, since the spare machine would stand in the primary region: the other regions are the spare
step 'deploy'
run "$FLYCTL" deploy --app "$APP" --config "$CONFIG" --ha=false --yes

# --- machines: a region that has some keeps its number, which an operator may have raised
step "machines in ${REGION_LIST[*]}"
machines=$(ask "$FLYCTL" machine list --app "$APP" --json) || fail 1 "cannot list the machines of $APP"
for region in "${REGION_LIST[@]}"; do
    if grep -qE "\"region\": *\"$region\"" <<<"$machines"; then
        echo "$region: has a machine"
    else
        ! $DRY_RUN || echo "only if $region has no machine:"
        run "$FLYCTL" scale count 1 --app "$APP" --region "$region" --yes
    fi
done

# --- health, asked of each region itself: fly-force-region has no fallback to another one
expected_region() {    # what /health of a machine there says; empty: not checked
    case $1 in
        iad) echo us-east ;;
        ams) echo eu-west ;;
        sin) echo asia-pacific ;;
    esac
}

look() {    # region
    ask curl --fail --silent --show-error --max-time 10 --header "fly-force-region: $1" "$HEALTH_URL/health"
}

healthy() {    # region; why not goes to stdout
    local body want
    want=$(expected_region "$1")
    body=$(look "$1" 2>&1) || {
        echo "${body:-no answer}"
        return 1
    }
    if [[ -n $want ]] && ! grep -qE "\"region\": *\"$want\"" <<<"$body"; then
        echo "expected an answer from $want, got $body"
        return 1
    fi
}

step 'health'
for region in "${REGION_LIST[@]}"; do
    if $DRY_RUN; then
        look "$region"
        continue
    fi
    for ((attempt = 1; ; attempt++)); do
        if reason=$(healthy "$region"); then
            echo "$region: healthy"
            break
        fi
        ((attempt < HEALTH_ATTEMPTS)) || fail 5 "$region: not healthy after $attempt tries: $reason"
        sleep "$HEALTH_PAUSE"
    done
done
$DRY_RUN || echo "deployed: $HEALTH_URL"
