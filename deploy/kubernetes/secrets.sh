#!/bin/sh
# Print the secrets that the manifests refer to, with new tokens and passwords, and Redis's users that match:
#   deploy/kubernetes/secrets.sh | kubectl apply -f -
# REDIS names another server as HOST:PORT; SCHEME=rediss if it speaks TLS.
set -eu
users=$(cat "$(dirname "$0")/../redis/users-7.acl")
server=${SCHEME:-redis}:// host=${REDIS:-redis:6379}
secret() { printf -- '---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: aspo}\nstringData:\n' "$1"; }
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

secret tokens
for scope in reader actor operator actor-operator; do printf '  %s: %s\n' "$scope" "$(random)"; done
secret redis-urls
for role in admin learner actor reader; do
  password=$(random)
  hash=$(printf %s "$password" | sha256sum | cut -d' ' -f1)
  users=$(printf %s "$users" | sed "s/@$(printf %s "$role" | tr a-z A-Z)@/$hash/")
  printf '  %s: %s%s:%s@%s/0\n' "$role" "$server" "$role" "$password" "$host"
done
secret redis-users
printf '  users.acl: |\n'
printf '%s\n' "$users" | sed 's/^/    /'
